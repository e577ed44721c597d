"""The project's graph with step processes: what Dagster's multiprocess executor makes of a run.

The executor is Dagster's own; its processes are forked instead of spawned, because the libraries
are loaded already and a spawned step would load them for ten seconds.
"""

from __future__ import annotations

import dagster as dg
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.base import Executor
from dagster._core.executor.multiprocess import MultiprocessExecutor

from llmrec_assets.definitions import build_defs

STEPS_AT_ONCE = 2


@dg.executor(name="forking", requirements=dg.multiple_process_executor_requirements())
def forking(_context: dg.InitExecutorContext) -> Executor:
    """``multiprocess_executor``, forking."""
    return MultiprocessExecutor(
        retries=RetryMode.DISABLED, max_concurrent=STEPS_AT_ONCE, start_method="fork"
    )


defs = build_defs(step_executor=forking)
