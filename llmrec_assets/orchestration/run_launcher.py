"""How the daemon launches runs, and how it sees that one is dead.

What belongs here: the run launcher that ``dagster.yaml`` names. What does not: how a dead run is
told (``dead_runs``).

Dagster's own launcher leaves it to the code server to notice that a run's process died. Where the
code server died too (the machine was restarted, ``dagster dev`` was killed), the run would be
"started" for ever and keep its place in the pool ``gpu``: nothing would ever train again.
"""

from __future__ import annotations

import socket

import dagster as dg
from dagster._core.launcher import (
    CheckRunHealthResult,
    DefaultRunLauncher,
    LaunchRunContext,
    WorkerStatus,
)

from llmrec_assets.orchestration.dead_runs import HOST_TAG, TAGS_OF_ANOTHER_PROCESS, is_gone


class WatchedRunLauncher(DefaultRunLauncher):
    """Dagster's launcher, whose runs the daemon's run monitoring looks after."""

    def launch_run(self, context: LaunchRunContext) -> None:
        tags = {HOST_TAG: socket.gethostname(), **TAGS_OF_ANOTHER_PROCESS}
        self._instance.add_run_tags(context.dagster_run.run_id, tags)
        super().launch_run(context)

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """FAILED where the run's process is gone; also for runs of ``llmrec run``."""
        if is_gone(self._instance, run):
            return CheckRunHealthResult(WorkerStatus.FAILED, "the process that ran it is gone")
        return CheckRunHealthResult(WorkerStatus.RUNNING)
