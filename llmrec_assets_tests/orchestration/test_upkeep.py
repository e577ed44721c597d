"""The jobs ``health`` and ``retention``, their commands, and what they see of Dagster."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import pandas as pd
import pytest
from filelock import FileLock

from llmrec_assets import cli
from llmrec_assets.ground.health import Finding
from llmrec_assets.orchestration.resources import GpuResource
from llmrec_assets.orchestration.upkeep import examine_everything

if TYPE_CHECKING:
    from conftest import Home

NOBODY = 2**22 + 7  # above every process id


@pytest.fixture
def place(new_home: Callable[..., Home]) -> Iterator[tuple[Home, dg.DagsterInstance]]:
    home = new_home()
    for user in range(4):
        frame = pd.DataFrame({"user_id": [user], "split": ["train"]})
        version = home.store.publish_table("user_splits", "sample|tiny", frame)
        path = Path(str(home.store.table_path("user_splits", "sample|tiny", version)))
        os.utime(path, (time.time() - 1000 + user,) * 2)
    with home.instance() as instance:
        yield home, instance


def amiss(home: Home, instance: dg.DagsterInstance, repair: bool = False) -> list[Finding]:
    gpu = GpuResource(lock_dir=str(home.root / "locks"))
    found = examine_everything(home.store, instance, gpu, repair)
    ours = ("runs", "pools", "device", "ticks")
    return [f for f in found if f.state != "ok" and f.check in ours]


def test_a_run_whose_process_is_gone_is_marked_and_frees_its_place(
    place: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = place
    run = instance.create_run_for_job(
        home.defs().resolve_job_def("recommender"),
        status=dg.DagsterRunStatus.STARTED,
        tags={
            "llmrec/pid": str(NOBODY),
            "llmrec/started": "1.0",
            "llmrec/host": socket.gethostname(),
        },
    )
    storage = instance.event_log_storage
    storage.initialize_concurrency_limit_to_default("gpu")
    storage.claim_concurrency_slot("gpu", run.run_id, "sft_checkpoint")
    (found,) = amiss(home, instance)
    assert (found.check, found.state) == ("runs", "problem")
    (mended,) = amiss(home, instance, repair=True)
    assert (mended.check, mended.state) == ("runs", "mended")
    assert storage.get_concurrency_run_ids() == set()
    assert amiss(home, instance) == []


def test_a_place_held_by_a_run_that_has_ended_is_freed(
    place: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = place
    run = instance.create_run_for_job(
        home.defs().resolve_job_def("recommender"), status=dg.DagsterRunStatus.STARTED
    )
    storage = instance.event_log_storage
    storage.initialize_concurrency_limit_to_default("gpu")
    storage.claim_concurrency_slot("gpu", run.run_id, "sft_checkpoint")
    assert amiss(home, instance) == []
    instance.report_run_failed(run, "killed")
    (found,) = amiss(home, instance)
    assert (found.check, found.state) == ("pools", "problem")
    (mended,) = amiss(home, instance, repair=True)
    assert mended.state == "mended"
    assert amiss(home, instance) == []


def test_a_dead_holder_of_the_device_is_told_and_a_living_one_is_not_touched(
    place: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = place
    locks = home.root / "locks"
    locks.mkdir()
    holder = locks / "cpu-0.json"
    fact = {"pid": NOBODY, "who": "sft_checkpoint sample|tiny", "since": 0.0}
    holder.write_text(json.dumps(fact))
    with FileLock(locks / "cpu-0.lock"):
        assert amiss(home, instance, repair=True) == []
    assert holder.exists()
    (found,) = amiss(home, instance)
    assert (found.check, found.state) == ("device", "note")
    assert f"sft_checkpoint sample|tiny (process {NOBODY}, gone)" in found.what
    assert [f.state for f in amiss(home, instance, repair=True)] == ["mended"]
    assert not holder.exists()


# -- jobs ---------------------------------------------------------------------------------


def run_job(
    home: Home, instance: dg.DagsterInstance, job: str, op: str, **config: object
) -> dg.ExecuteInProcessResult:
    return (
        home.defs()
        .resolve_job_def(job)
        .execute_in_process(
            instance=instance, run_config={"ops": {op: {"config": config}}}, raise_on_error=False
        )
    )


def test_the_health_job_fails_on_a_problem_and_mends_with_repair(
    place: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = place  # its tables have no views yet
    failed = run_job(home, instance, "health", "examine_home")
    assert not failed.success
    (event,) = failed.filter_events(lambda event: event.is_step_failure)
    assert "1 problem: views: " in event.step_failure_data.error.message
    assert "| views | problem |" in str(event.step_failure_data.user_failure_data.metadata)
    mended = run_job(home, instance, "health", "examine_home", repair=True)
    assert mended.success
    assert run_job(home, instance, "health", "examine_home").success


def versions(home: Home) -> list[str]:
    place = home.location / "tables" / "user_splits" / "sample" / "tiny"
    return sorted(path.stem for path in place.glob("*.parquet"))


def test_the_retention_job_lists_and_removes_only_when_asked(
    place: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = place
    before = versions(home)
    assert run_job(home, instance, "retention", "remove_old_versions", keep=2).success
    assert versions(home) == before
    assert not run_job(home, instance, "retention", "remove_old_versions", keep=1).success
    done = run_job(home, instance, "retention", "remove_old_versions", keep=2, remove=True)
    assert done.success
    assert len(versions(home)) == 2
    (output,) = done.filter_events(lambda event: event.is_successful_output)
    assert output.event_specific_data.metadata["versions"].value == 2


# -- commands -----------------------------------------------------------------------------


def test_prune_lists_first_and_removes_with_yes(
    place: tuple[Home, dg.DagsterInstance],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, _ = place
    monkeypatch.setenv("LLMREC_HOME", str(home.location))
    before = versions(home)
    assert cli.main(["prune", "--keep", "2"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 4 and versions(home) == before
    assert listed[-1] == "nothing was removed: `llmrec prune --yes` removes what is listed"
    assert cli.main(["prune", "--keep", "2", "--yes"]) == 0
    assert capsys.readouterr().out.splitlines() == listed[:-1]
    assert len(versions(home)) == 2
    assert cli.main(["prune", "--keep", "0"]) == 1
    assert "keep is 0, expected at least 2" in capsys.readouterr().err


def test_health_prints_a_table_and_says_by_its_status_whether_a_problem_is_left(
    place: tuple[Home, dg.DagsterInstance],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, _ = place
    for name, value in home.environment().items():
        monkeypatch.setenv(name, value)
    assert cli.main(["health"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "state", "what", "remedy"]
    assert [line.split()[0] for line in lines if " problem " in line] == ["views"]
    assert cli.main(["health", "--repair"]) == 0
    assert " mended " in capsys.readouterr().out
    assert cli.main(["health"]) == 0
