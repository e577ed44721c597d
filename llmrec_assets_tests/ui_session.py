"""One session in the UI that the ``test_ui*`` files look at: what is launched, clicked and seen.

A server, a browser and each run of many processes costs seconds, so they share these: two runs that
must fail, two trainings of which one has to wait, and ``prompts``, clicked in the browser where
there is one. ``conftest`` hands the fixtures out.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import ui_browser
from ui_server import Ui, home_with_history, planted, served, stranger

from llmrec_assets.orchestration.resources import GpuResource

if TYPE_CHECKING:
    from conftest import FinishedRun, Home

#: Not published in the UI's home: these two have to be trained.
TRAININGS = ("dpo_checkpoint", "reward_model")
#: Published, so it costs no training; needs the pool and waits all the same.
BEHIND = "rlhf_checkpoint"
PARTITION = "sample|tiny"
#: Seconds a run may take on a machine that is busy with other things.
LONG = 600


@pytest.fixture(scope="session")
def ui(finished: FinishedRun, new_home: Callable[..., Home]) -> Iterator[Ui]:
    """``dagster dev`` over a home in which everything but ``TRAININGS`` is there, with a secret in
    every variable of its environment that holds one."""
    home = home_with_history(finished, new_home)
    for name in TRAININGS:
        shutil.rmtree(home.location / "checkpoints" / name)
    with (
        stranger(401) as hub,
        stranger(200) as webhook,
        served(home, planted(hub, webhook)) as ui,
    ):
        # First of all: until the alert about them is out half a minute goes by.
        ui.planted.failing_runs.extend(
            [ui.launch("source_data", "ml-100k"), ui.launch("prepare_base_model", "paper")]
        )
        yield ui


@pytest.fixture(scope="session")
def page_or_none(ui: Ui) -> Iterator[ui_browser.Page | None]:
    if ui_browser.missing() is not None:
        yield None
        return
    with ui_browser.browsing(f"http://127.0.0.1:{ui.port}", ui.home.root) as page:
        yield page


@pytest.fixture
def page(page_or_none: ui_browser.Page | None) -> ui_browser.Page:
    """The browser's tab; skips, with the reason, where there is no browser."""
    if page_or_none is None:
        pytest.skip(ui_browser.missing())
    return page_or_none


@dataclass(frozen=True)
class Clicked:
    ui: Ui
    first: str
    """Run of ``TRAININGS``: one of them gets the pool, the other waits for it."""
    second: str
    """Run of ``BEHIND``, launched while the first had the pool."""
    prompts: str
    """Run of ``prompts``, clicked in the browser or else launched as a click would; launched last
    and ended while the two others waited."""
    waiting: dict[str, str]
    """Status of the two others when ``prompts`` had ended."""
    active: set[int]
    """Numbers of gpu slots seen in use."""
    claimed: list[tuple[str, str]]
    """Run and step of whoever had the pool's slot meanwhile."""
    pending: list[tuple[str, str]]
    """Run and step of whoever waited for it."""
    queue_page: str
    """What the page of the pool said then; empty without a browser."""
    during: dict[str, str]
    """What readers printed while the runs went on."""
    holder: subprocess.Popen[str]
    """Has held the warehouse open for writing since before a run published it anew."""


HOLDER = """
import sys, duckdb
connection = duckdb.connect(sys.argv[1])  # for reading and writing
print("open", flush=True)
for line in sys.stdin:
    print(connection.sql(line).fetchall()[0][0], flush=True)
"""


@pytest.fixture(scope="session")
def clicked(ui: Ui, page_or_none: ui_browser.Page | None) -> Iterator[Clicked]:
    """Trainings at once, with the device held by somebody outside until it was seen who waits for
    whom; meanwhile others read the tables, one keeps the warehouse open for writing, and
    ``prompts`` are materialized."""
    device = GpuResource(lock_dir=str(ui.home.root / "locks"))
    active = set()
    with pytest.MonkeyPatch.context() as environment, contextlib.ExitStack() as held:
        environment.setenv("LLMREC_DEVICE", "cpu")  # as in the UI's environment
        held.enter_context(device.lease(logging.getLogger(__name__), "somebody outside"))
        first = ui.launch("recommender", PARTITION, *TRAININGS)
        ui.wait(first, LONG, until=lambda: bool(ui.claimed() and ui.pending()))
        second = ui.launch("recommender", PARTITION, BEHIND)
        during = {name: read(command, ui.home) for name, command in readers(ui.home).items()}
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(ui.home.location / "warehouse.duckdb")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout
        assert holder.stdout.readline() == "open\n"
        if page_or_none is not None:
            prompts = materialize(ui, page_or_none, "prompts", PARTITION)
        else:
            prompts = ui.launch("recommender", PARTITION, "prompts")
        ui.wait(prompts, LONG)
        queue_page = see_the_queue(page_or_none, second) if page_or_none is not None else ""
        claimed, pending = ui.claimed(), ui.pending()
        # Loading the libraries, the step may take longer to ask for the device than all of this.
        ui.wait(first, LONG, until=lambda: "held by somebody outside" in ui.log())
        active.add(ui.pool()["activeSlotCount"])
        waiting = {run_id: str(ui.run(run_id)["status"]) for run_id in (first, second)}

    def look(run_id: str) -> Callable[[], bool]:
        def ended() -> bool:
            active.add(ui.pool()["activeSlotCount"])
            return bool(ui.run(run_id)["status"] == "SUCCESS")

        return ended

    started = time.monotonic()
    for run_id in (first, second):
        ui.wait(run_id, LONG, until=look(run_id))
    print(f"the trainings, from the free device: {time.monotonic() - started:.0f} s")
    try:
        yield Clicked(
            ui,
            first,
            second,
            prompts,
            waiting,
            active,
            claimed,
            pending,
            queue_page,
            during,
            holder,
        )

    finally:
        holder.kill()
        holder.communicate()


def duckdb_cli() -> Path:
    return Path(sys.executable).with_name("duckdb")


def readers(home: Home) -> dict[str, list[str]]:
    """Two ways to count the ratings."""
    warehouse = str(home.location / "warehouse.duckdb")
    return {
        "llmrec": [sys.executable, "-m", "llmrec_assets.cli", "sql"],
        "duckdb": [str(duckdb_cli()), "-readonly", "-noheader", "-csv", warehouse],
    }


def read(command: list[str], home: Home) -> str:
    done = subprocess.run(
        [*command, "select count(*) as n from ratings"],
        env=home.environment(),
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def see_the_queue(page: ui_browser.Page, waiting: str) -> str:
    """The page of the pool once it shows that this run's step waits."""
    page.open("/deployment/concurrency/gpu")
    page.see(waiting[:8])
    page.picture("queue")
    return page.text


def materialize(ui: Ui, page: ui_browser.Page, asset: str, partition: str) -> str:
    """Clicks an asset's partition through the dialog; returns the id of the run."""
    before = set(ui.runs())
    page.open(f"/assets/{asset}")
    page.click("Materialize…")
    title = f"Launch runs to materialize {asset}"
    page.see(title)
    for key in partition.split("|"):
        page.click("Select a partition or create one")
        page.click_at(f"//li[.//*[@title='{key}']]", key)
        page.click(title)  # closes the list
    page.picture("dialog")
    page.click("Launch 1 run")
    deadline = time.monotonic() + ui_browser.PATIENCE
    while not (launched := set(ui.runs()) - before):  # the page names it for some seconds only
        assert time.monotonic() < deadline, page.text
        time.sleep(0.2)
    (run_id,) = launched
    return run_id
