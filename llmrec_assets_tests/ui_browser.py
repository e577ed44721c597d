"""A browser in front of the UI: Chromium from the system's packages, headless.

What belongs here: starting it, and looking, clicking and waiting in words that stand on the page.
What does not: the server (``ui_server``), any test.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 1280, 900
#: Seconds a page may take to show what is asked for.
PATIENCE = 60


def missing() -> str | None:
    """Why there is no browser here, or None where there is one."""
    if importlib.util.find_spec("selenium") is None:
        return "the package selenium is not installed (the extra `dev` has it)"
    if not _found("chromium", "chromium-browser", "google-chrome"):
        return "no Chromium: apt-get install chromium chromium-driver"
    if not _found("chromedriver"):
        return "no chromedriver: apt-get install chromium-driver"
    return None


def _found(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


class Page:
    """One tab. Whatever is not there in time is an AssertionError that quotes the page, beside a
    picture of it in ``directory``."""

    def __init__(self, driver: Any, base: str, directory: Path) -> None:
        self._driver = driver
        self._base = base
        self._directory = directory

    def open(self, path: str) -> None:
        self._driver.get(self._base + path)

    @property
    def path(self) -> str:
        return str(self._driver.current_url).removeprefix(self._base)

    @property
    def text(self) -> str:
        return str(self._driver.execute_script("return document.body.innerText"))

    def see(self, text: str) -> Any:
        """The first visible element whose own text is ``text``, once there is one."""
        return self.find(f"//*[text()[normalize-space()={_quoted(text)}]]", repr(text))

    def see_part(self, text: str) -> Any:
        """Like ``see``, where the text is a part of an element's own."""
        return self.find(f"//*[text()[contains(., {_quoted(text)})]]", repr(text))

    def find(self, xpath: str, what: str) -> Any:
        """The first visible element of an XPath."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + PATIENCE
        while True:
            for element in self._driver.find_elements("xpath", xpath):
                try:
                    if element.is_displayed():
                        return element
                except StaleElementReferenceException:  # drawn anew between the two questions
                    break
            if time.monotonic() > end:
                self._fail(f"no {what} after {PATIENCE} s")
            time.sleep(0.2)

    def click(self, text: str) -> None:
        self._click(lambda: self.see(text), text)

    def click_at(self, xpath: str, what: str) -> None:
        self._click(lambda: self.find(xpath, what), what)

    def _click(self, find: Any, what: str) -> None:
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + PATIENCE
        while True:
            try:
                find().click()
                return
            except WebDriverException as error:  # covered or drawn anew: a moment later
                if time.monotonic() > end:
                    self._fail(f"{what!r} cannot be clicked: {error.msg}")
                time.sleep(0.2)

    def run(self, script: str, *arguments: Any) -> Any:
        """JavaScript in the page."""
        return self._driver.execute_script(script, *arguments)

    def picture(self, name: str) -> Path:
        """A PNG of the window."""
        path = self._directory / f"{name}.png"
        self._driver.save_screenshot(str(path))
        return path

    def _fail(self, message: str) -> None:
        picture = self.picture("failure")
        raise AssertionError(f"{message} on {self.path}; picture: {picture}\n{self.text[:3000]}")


def _quoted(text: str) -> str:
    assert '"' not in text
    return f'"{text}"'


@contextmanager
def browsing(base: str, directory: Path) -> Iterator[Page]:
    """A tab of a headless Chromium with a profile of its own, until the block ends."""
    os.environ.setdefault("SE_AVOID_STATS", "true")
    os.environ.setdefault("SE_OFFLINE", "true")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = _found("chromium", "chromium-browser", "google-chrome") or ""
    for argument in (
        *("headless=new", f"window-size={WIDTH},{HEIGHT}", "hide-scrollbars", "lang=en-GB"),
        # It speaks to this machine's server and to nobody else.
        *("no-proxy-server", "disable-background-networking", "disable-component-update"),
        *("disable-sync", "no-first-run", "disable-default-apps", "disable-dev-shm-usage"),
        *(["no-sandbox"] if os.getuid() == 0 else []),  # Chromium's refuses to start as root
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(_found("chromedriver"))
    )
    try:
        driver.set_page_load_timeout(2 * PATIENCE)
        yield Page(driver, base, directory)
    finally:
        driver.quit()
