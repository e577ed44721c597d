"""Runs that the UI launched and whose process, code server included, is gone."""

from __future__ import annotations

import socket
import subprocess
import time

import dagster as dg
import psutil
import pytest
from dagster._core.launcher import WorkerStatus

from llmrec_assets.orchestration import dead_runs as judging
from llmrec_assets.orchestration.dead_runs import (
    TAGS_OF_ANOTHER_PROCESS,
    burying_dead_runs,
    dead_runs,
    free_slots_of_ended_runs,
    is_gone,
)
from llmrec_assets.orchestration.run_launcher import WatchedRunLauncher

LAUNCHER = {
    "run_launcher": {
        "module": "llmrec_assets.orchestration.run_launcher",
        "class": "WatchedRunLauncher",
    },
    "concurrency": {"pools": {"default_limit": 1, "granularity": "op"}},
}


@dg.op
def nothing() -> None:
    pass


@dg.job
def idle() -> None:
    nothing()


def launched_run(instance: dg.DagsterInstance, pid: int, **tags: str) -> dg.DagsterRun:
    """A run as one launched by the daemon stands in the storage while it goes on."""
    run = instance.create_run_for_job(
        idle,
        tags={"llmrec/host": socket.gethostname(), **tags},
        status=dg.DagsterRunStatus.STARTED,
    )
    instance.report_engine_event(f"Started process for run (pid: {pid}).", run)
    return run


def test_a_launched_run_is_gone_when_its_process_is() -> None:
    with (
        dg.instance_for_test(overrides=LAUNCHER) as instance,
        subprocess.Popen(["sleep", "60"]) as worker,
    ):
        assert isinstance(instance.run_launcher, WatchedRunLauncher)
        assert instance.run_launcher.supports_check_run_worker_health
        run = launched_run(instance, worker.pid)
        elsewhere = launched_run(instance, 999_999_999, **{"llmrec/host": "elsewhere"})
        starting = instance.create_run_for_job(
            idle, tags={"llmrec/host": socket.gethostname()}, status=dg.DagsterRunStatus.STARTED
        )
        health = instance.run_launcher.check_run_worker_health
        assert [health(r).status for r in (run, elsewhere, starting)] == [WorkerStatus.RUNNING] * 3
        assert dead_runs(instance) == []
        worker.kill()
        while psutil.Process(worker.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert health(run).status == WorkerStatus.FAILED
        assert [health(r).status for r in (elsewhere, starting)] == [WorkerStatus.RUNNING] * 2
        assert [r.run_id for r in dead_runs(instance)] == [run.run_id]


def test_a_process_id_given_to_another_since_is_not_the_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with dg.instance_for_test() as instance, subprocess.Popen(["sleep", "60"]) as other:
        began = psutil.Process(other.pid).create_time()
        monkeypatch.setattr("time.time", lambda: began - 60)  # the run spoke a minute before
        run = launched_run(instance, other.pid)
        monkeypatch.undo()
        assert is_gone(instance, run)
        other.kill()


def test_tags_copied_from_a_dead_command_do_not_condemn_a_launched_run() -> None:
    """Launching a failed `llmrec run` again in the UI takes over its tags."""
    dead = {"llmrec/pid": "999999999", "llmrec/started": "1.0"}
    with (
        dg.instance_for_test(overrides=LAUNCHER) as instance,
        subprocess.Popen(["sleep", "60"]) as worker,
    ):
        assert not is_gone(instance, launched_run(instance, worker.pid, **dead))
        tags = {"llmrec/host": socket.gethostname(), **dead, **TAGS_OF_ANOTHER_PROCESS}
        starting = instance.create_run_for_job(idle, tags=tags, status=dg.DagsterRunStatus.STARTING)
        assert not is_gone(instance, starting)
        worker.kill()


def test_a_run_that_ended_well_meanwhile_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It succeeded, and its process went, after its status was read."""
    with dg.instance_for_test() as instance:
        run = launched_run(instance, 999_999_999)
        found = dead_runs(instance)
        assert [one.run_id for one in found] == [run.run_id]
        instance.report_engine_event("ended", run)
        instance.handle_run_event(
            run.run_id,
            dg.DagsterEvent(dg.DagsterEventType.RUN_SUCCESS.value, run.job_name),
        )
        monkeypatch.setattr(judging, "dead_runs", lambda instance: found)
        assert judging.bury_dead_runs(instance) == []
        assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.SUCCESS


def test_slots_are_freed_of_runs_that_die_meanwhile_and_of_those_that_have_ended() -> None:
    """As ``llmrec run`` does it where no daemon runs."""
    with (
        dg.instance_for_test(overrides=LAUNCHER) as instance,
        subprocess.Popen(["sleep", "60"]) as worker,
    ):
        storage = instance.event_log_storage
        storage.initialize_concurrency_limit_to_default("gpu")
        run = launched_run(instance, worker.pid)
        assert storage.claim_concurrency_slot("gpu", run.run_id, "sft_checkpoint").is_claimed
        with burying_dead_runs(instance, every_seconds=0.05):
            time.sleep(0.2)
            assert not storage.claim_concurrency_slot("gpu", "mine", "step").is_claimed
            worker.kill()
            deadline = time.monotonic() + 20
            while not storage.claim_concurrency_slot("gpu", "mine", "step").is_claimed:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE
        storage.free_concurrency_slot_for_step("mine", "step")

        ended = instance.create_run_for_job(idle, status=dg.DagsterRunStatus.FAILURE)
        assert storage.claim_concurrency_slot("gpu", ended.run_id, "sft_checkpoint").is_claimed
        free_slots_of_ended_runs(instance)
        assert storage.claim_concurrency_slot("gpu", "mine", "step").is_claimed
