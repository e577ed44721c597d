"""What a person sees in the UI, in headless Chromium; skipped, saying why, where there is none.

The clicks and the queue happen once, in ``ui_session``. Every picture that is taken lies beside the
server's log; those in ``docs/images`` were made so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from ui_browser import Page
from ui_session import TRAININGS, Clicked

if TYPE_CHECKING:
    from conftest import FinishedRun

pytestmark = pytest.mark.timeout(900)


def test_prompts_are_materialized_by_clicking(
    page: Page, clicked: Clicked, finished: FinishedRun
) -> None:
    page.open(f"/runs/{clicked.prompts}")
    page.see("Success")
    page.see_part("sample|tiny")
    page.open("/assets/prompts")
    for word in ("sample|tiny", "user_id", "completion"):
        page.see(word)
    mine, theirs = clicked.ui.home.current(), finished.home.current()
    assert mine["prompts"] == theirs["prompts"]


def test_training_is_seen_to_queue_behind_training(page: Page, clicked: Clicked) -> None:
    shown = clicked.queue_page
    assert "There are no active or pending steps" not in shown
    steps, runs = shown.split("Queued runs", maxsplit=1)
    assert clicked.first[:8] in steps and all(name in steps for name in TRAININGS)
    assert clicked.second[:8] in runs and "Queued" in runs


def test_the_lineage_and_the_plots_of_the_metric_table(page: Page, clicked: Clicked) -> None:
    page.open("/assets/metric_table?view=lineage")
    for name in ("prompts", "user_metrics", "comparisons", "metric_table", "report", "champion"):
        page.see(name)
    page.picture("lineage")
    page.open("/assets/metric_table")
    show(page, "plot")
    # The picture is drawn, and as large as it was made: nothing in it is scaled down.
    drawn = page.find("//img[@alt='user-split']", "plot")
    width, height, shown = page.run(
        "const i = arguments[0]; return [i.naturalWidth, i.naturalHeight, i.clientWidth]", drawn
    )
    assert width == shown == 900 and height > 800
    page.picture("plot")
    page.click("Close")
    show(page, "made_from")
    run = page.find("//a[contains(@href, '/runs/')][string-length(text()) = 8]", "link to a run")
    assert run.text in {run_id[:8] for run_id in clicked.ui.runs()}
    page.see("ratings")
    page.picture("made_from")


def show(page: Page, key: str) -> None:
    """Opens the text or picture behind a link in the metadata's table."""
    row = f"//tr[td[normalize-space(.)='{key}']]"
    page.click_at(f"{row}//*[contains(text(), 'Show Markdown')]", f"metadata {key}")
