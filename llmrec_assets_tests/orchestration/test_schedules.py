"""Weekly schedules: what they ask for, their time zone, and what becomes of a missed tick."""

from __future__ import annotations

import datetime as dt
import logging
import os
import time
import zoneinfo
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import pytest
from dagster._core.test_utils import create_test_daemon_workspace_context, freeze_time
from dagster._core.workspace.load_target import ModuleTarget
from dagster._scheduler.scheduler import launch_scheduled_runs

from llmrec_assets.definitions import build_defs
from llmrec_assets.ground.errors import LlmrecError
from llmrec_assets.orchestration.schedules import (
    MISSED_TAG,
    trained_partitions,
    weekly_retraining,
)
from llmrec_assets.orchestration.ticks import CRON, missed_ticks, timezone

if TYPE_CHECKING:
    from conftest import Home

PROJECT = Path(__file__).resolve().parents[2]
SUNDAY = dt.datetime(2026, 3, 1, 4, tzinfo=dt.UTC)
WEEK = dt.timedelta(weeks=1)


def test_both_are_off_and_say_their_zone() -> None:
    schedules = build_defs().get_repository_def().schedule_defs
    assert {schedule.name: schedule.cron_schedule for schedule in schedules} == CRON
    for schedule in schedules:
        assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
        assert schedule.execution_timezone == "UTC"


def test_the_zone_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMREC_TIMEZONE", raising=False)
    assert timezone() == "UTC"
    monkeypatch.setenv("LLMREC_TIMEZONE", "Europe/Berlin")
    assert timezone() == "Europe/Berlin"
    for wrong in ("Berlin", "../../etc/passwd", "Europe/", "UTC+1 "):
        monkeypatch.setenv("LLMREC_TIMEZONE", wrong)
        with pytest.raises(LlmrecError, match="is no time zone: use an IANA name"):
            timezone()


def test_four_o_clock_exists_once_on_every_day_in_every_zone() -> None:
    """At a change of clocks an hour is missing or comes twice; Dagster would shift the tick."""
    for name in sorted(zoneinfo.available_timezones()):
        zone = zoneinfo.ZoneInfo(name)
        for day in range(365 * 4):
            local = dt.datetime(2026, 1, 1, 4) + dt.timedelta(days=day)
            if local.weekday() not in (6, 0):
                continue
            early, late = (local.replace(tzinfo=zone, fold=fold) for fold in (0, 1))
            assert early.utcoffset() == late.utcoffset(), (name, local)


def evaluate(
    home: Home, instance: dg.DagsterInstance, at: dt.datetime = SUNDAY
) -> tuple[list[dg.RunRequest], str | None]:
    defs = home.defs()
    with dg.build_schedule_context(
        instance=instance,
        scheduled_execution_time=at,
        repository_def=defs.get_repository_def(),
        resources={"storage": defs.resources["storage"]},
    ) as context:
        ticked = weekly_retraining.evaluate_tick(context)
    return list(ticked.run_requests or []), ticked.skip_message


def test_nothing_trained_asks_for_nothing(new_home: Callable[..., Home]) -> None:
    home = new_home()
    with home.instance() as instance:
        requests, skipped = evaluate(home, instance)
    assert requests == []
    assert skipped is not None and "nothing has changed" in skipped


@pytest.fixture(scope="module")
def trained(new_home: Callable[..., Home]) -> Iterator[tuple[Home, dg.DagsterInstance]]:
    """``sample | tiny`` up to the prompts, and something published as its SFT checkpoint."""
    home = new_home()
    with home.instance() as instance:
        make_source(home, instance)
        tables = ("user_splits", "catalogue", "interaction_windows", "prompts")
        assert home.materialize(instance, *tables).success
        files = home.store.work_directory("sft_checkpoint", "sample|tiny", "0" * 16) / "files"
        files.mkdir()
        home.store.publish_checkpoint(
            "sft_checkpoint", "sample|tiny", "0" * 16, files, determinants={}, facts={}
        )
        yield home, instance


def make_source(home: Home, instance: dg.DagsterInstance) -> None:
    source = ("movielens_files", "users", "movies", "incoming_ratings", "ratings")
    assert home.materialize(instance, *source, job="source_data", partition="sample").success


def test_a_partition_in_which_nothing_changed_is_left_alone_and_then_runs_as_a_whole(
    trained: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = trained
    assert trained_partitions(home.store) == ["sample|tiny"]
    make_source(home, instance)  # identical
    requests, skipped = evaluate(home, instance)
    assert requests == []
    assert skipped is not None

    place = home.location / "incoming" / "sample"
    (place / "new.csv").write_text("user_id,movie_id,rating,timestamp\n1,83,1,1900000000\n")
    os.utime(place / "new.csv", (time.time() - 60,) * 2)
    make_source(home, instance)
    requests, skipped = evaluate(home, instance)
    assert skipped is None
    (request,) = requests
    assert request.partition_key == "sample|tiny"
    assert request.run_key == "sample|tiny-2026-03-01T04:00:00+00:00"
    assert MISSED_TAG not in request.tags
    expected = home.defs().resolve_job_def("recommender").asset_layer.executable_asset_keys
    assert set(request.asset_selection or []) == set(expected)


# -- ticks --------------------------------------------------------------------------------


def test_the_daemon_makes_up_for_the_newest_missed_tick_and_the_others_are_told(
    new_home: Callable[..., Home], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster's own scheduler, asked four weeks after it was last there."""
    home = new_home()
    for name, value in home.environment().items():
        monkeypatch.setenv(name, value)
    monday = SUNDAY + dt.timedelta(days=1)
    on = monday - dt.timedelta(hours=1)
    back = monday + 3 * WEEK + dt.timedelta(hours=5)
    target = ModuleTarget("llmrec_assets.definitions", None, str(PROJECT), "llmrec_assets")
    with (
        home.instance() as instance,
        create_test_daemon_workspace_context(target, instance) as workspace,
    ):
        location = workspace.create_request_context().get_code_location("llmrec_assets")
        schedule = location.get_repository("__repository__").get_schedule("weekly_retention")
        with freeze_time(on):
            instance.start_schedule(schedule)
        assert missed_ticks(instance, "weekly_retention", on) == []
        overdue = missed_ticks(instance, "weekly_retention", back)
        assert [str(tick) for tick in overdue] == [
            f"{monday + n * WEEK:%Y-%m-%d} 04:00 UTC" for n in range(4)
        ]
        assert not any(tick.overtaken for tick in overdue)
        assert missed_ticks(instance, "weekly_retraining", back) == []  # it is off

        with freeze_time(back):
            list(launch_scheduled_runs(workspace, logging.getLogger("test"), back, {}))
        (run,) = instance.get_runs()
        assert run.job_name == "retention"
        assert run.tags["dagster/schedule_name"] == "weekly_retention"
        assert run.tags[".dagster/scheduled_execution_time"] == (monday + 3 * WEEK).isoformat()
        assert run.run_config["ops"]["remove_old_versions"]["config"] == {"remove": True}
        missed = missed_ticks(instance, "weekly_retention", back)
        assert [(tick.due, tick.overtaken) for tick in missed] == [
            (monday + n * WEEK, True) for n in range(3)
        ]
        # five weeks later nobody needs to hear of them any more
        late = back + 5 * WEEK
        assert all(tick.due > back for tick in missed_ticks(instance, "weekly_retention", late))
