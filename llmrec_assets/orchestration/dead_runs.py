"""Runs whose process is gone.

What belongs here: telling by process id and start time, and freeing what such a run holds. What
does not: the daemon's own look (``run_launcher``), a step whose run worker is gone
(``run_worker``).

A run of ``llmrec run`` names its process in its tags. One that the UI, a schedule or a sensor
launched is a process that the code server started; that process tells its id in the run's log, and
the launcher notes the machine. Runs of other machines are not judged.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterator

import dagster as dg
import psutil

HOST_TAG = "llmrec/host"
_PID_TAG = "llmrec/pid"
_STARTED_TAG = "llmrec/started"
#: A launched run tells its process itself; copied from a run of ``llmrec run``, these would name
#: another's.
TAGS_OF_ANOTHER_PROCESS = {_PID_TAG: "", _STARTED_TAG: ""}
#: What the process of a launched run says first.
_LAUNCHED = re.compile(r"Started process for run \(pid: (\d+)\)")
#: What the clocks of a process's start and of an event may differ by, seconds.
_CLOCK = 1.0


def tags_of_this_process() -> dict[str, str]:
    """Run tags by which another process can tell whether this one still lives."""
    me = psutil.Process()
    return {
        _PID_TAG: str(me.pid),
        _STARTED_TAG: str(_start(me)),
        HOST_TAG: socket.gethostname(),
    }


def bury_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Fails runs whose process is gone and frees the pool slots they hold; returns their ids.

    A killed one would otherwise hold the GPU's slot for ever.
    """
    buried = []
    for run in dead_runs(instance):
        now = instance.get_run_by_id(run.run_id)
        if now is None or now.status != run.status:
            continue  # it ended well between the look at its status and the one at its process
        instance.report_run_failed(run, "the process that ran it is gone (killed?)")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        buried.append(run.run_id)
    return buried


def free_slots_of_ended_runs(instance: dg.DagsterInstance) -> None:
    """Frees places in pools of runs that have ended. The daemon does it; here for where none is."""
    storage = instance.event_log_storage
    if not storage.supports_global_concurrency_limits:
        return
    for run_id in storage.get_concurrency_run_ids():
        run = instance.get_run_by_id(run_id)
        if run is not None and run.is_finished:
            storage.free_concurrency_slots_for_run(run_id)


@contextlib.contextmanager
def burying_dead_runs(instance: dg.DagsterInstance, every_seconds: float = 15.0) -> Iterator[None]:
    """Buries dead runs, and frees slots of ended ones, now and again and again meanwhile.

    Who waits for a slot must not wait for a run that dies now, also where no daemon looks.
    """
    ended = threading.Event()

    def look() -> None:
        while True:
            with contextlib.suppress(Exception):  # the next look may succeed, the run goes on
                bury_dead_runs(instance)
                free_slots_of_ended_runs(instance)
            if ended.wait(every_seconds):
                return

    watch = threading.Thread(target=look, name="bury-dead-runs", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def dead_runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Unfinished runs on this machine whose process is gone."""
    unfinished = dg.RunsFilter(
        statuses=[
            dg.DagsterRunStatus.NOT_STARTED,  # killed between its record and its first event
            dg.DagsterRunStatus.STARTING,
            dg.DagsterRunStatus.STARTED,
        ],
    )
    return [run for run in instance.get_runs(filters=unfinished) if is_gone(instance, run)]


def is_gone(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether the process of this run is known, was on this machine, and lives no more."""
    if run.tags.get(HOST_TAG) != socket.gethostname():
        return False
    launched, said = launched_process(instance, run)
    if launched is not None:
        return not _alive(launched, None, said)
    pid, started = run.tags.get(_PID_TAG), run.tags.get(_STARTED_TAG)
    return bool(pid and started) and not _alive(int(pid or 0), float(started or 0))


def launched_process(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[int | None, float]:
    """The id of a launched run's process, and when it told it; None while it has not."""
    events = instance.get_records_for_run(
        run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT
    ).records
    for record in reversed(events):
        entry = record.event_log_entry
        event = entry.dagster_event
        found = _LAUNCHED.match(event.message or "") if event is not None else None
        if found:
            return int(found[1]), entry.timestamp
    return None, 0.0


def _alive(pid: int, started: float | None, said: float = 0.0) -> bool:
    """Whether that very process lives: a pid alone may have been given to another since.

    Args:
        started: ``_start`` of it; None: known only to have lived at ``said``.
    """
    if pid == os.getpid():
        return True
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # killed, and its parent has not looked yet
            return False
        if started is not None:
            return abs(_start(process) - started) < _CLOCK
        if process.create_time() <= said + _CLOCK:
            return True
        # Started later, by a clock that may have been set since: Dagster's run processes are
        # children of Python's multiprocessing, which another program with this id hardly is.
        return any("multiprocessing" in word for word in process.cmdline())
    except psutil.Error:
        return False


def _start(process: psutil.Process) -> float:
    """Seconds from the machine's start to the process's. The time of day would not do: psutil adds
    up to it anew at every call, so it moves when the clock is set, under a process that lives."""
    return process.create_time() - psutil.boot_time()
