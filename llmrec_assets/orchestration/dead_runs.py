"""Runs of ``llmrec run`` whose process is gone.

What belongs here: telling by process id and start time, and freeing what such a run holds. What
does not: runs that the UI launched, which the code server that ran them looks after.
"""

from __future__ import annotations

import os
import socket

import dagster as dg
import psutil

_PID_TAG = "llmrec/pid"
_STARTED_TAG = "llmrec/started"
_HOST_TAG = "llmrec/host"


def tags_of_this_process() -> dict[str, str]:
    """Run tags by which another process can tell whether this one still lives."""
    me = psutil.Process()
    return {
        _PID_TAG: str(me.pid),
        _STARTED_TAG: str(me.create_time()),
        _HOST_TAG: socket.gethostname(),
    }


def bury_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Fails runs whose process is gone and frees the pool slots they hold; returns their ids.

    Only runs of this command on this host are judged. A killed one would otherwise hold the GPU's
    slot for ever. Runs that the UI launched are looked after by the code server that ran them.
    """
    dead = dead_runs(instance)
    for run in dead:
        instance.report_run_failed(run, "the process that ran it is gone (killed?)")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return [run.run_id for run in dead]


def dead_runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Unfinished runs of this command on this host whose process is gone."""
    unfinished = dg.RunsFilter(
        statuses=[
            dg.DagsterRunStatus.NOT_STARTED,  # killed between its record and its first event
            dg.DagsterRunStatus.STARTING,
            dg.DagsterRunStatus.STARTED,
        ],
    )
    dead = []
    for run in instance.get_runs(filters=unfinished):
        pid, started = run.tags.get(_PID_TAG), run.tags.get(_STARTED_TAG)
        if pid is None or started is None or run.tags.get(_HOST_TAG) != socket.gethostname():
            continue
        if not _alive(int(pid), float(started)):
            dead.append(run)
    return dead


def _alive(pid: int, started: float) -> bool:
    """Whether that very process lives: a pid alone may have been given to another since."""
    if pid == os.getpid():
        return True
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # killed, and its parent has not looked yet
            return False
        return abs(process.create_time() - started) < 1.0
    except psutil.Error:
        return False
