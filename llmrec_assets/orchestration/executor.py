"""How a run starts the processes of its steps.

What belongs here: the executor of all jobs. What does not: a run's own process
(``run_launcher``), a step whose run worker is gone (``run_worker``).

Started afresh, a step's process spends its first seconds on importing Dagster, the assets and the
libraries of models. Here a server process of the run imports them once, and every step is forked
from it. The server loads no model, holds no lock of ours, and ends with its run.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from typing import Any

import dagster as dg

from llmrec_assets.orchestration.resources import GPU_POOL

#: What the server of a run's steps imports before the first: the definitions and the ground floor,
DEFINITIONS = "llmrec_assets.preload"
#: and what models need, before a run that trains or answers, where forking is safe with it.
MODELS = "llmrec_assets.preload_models"
#: Steps beside others that need them without the device: LensKit imports PyTorch.
FITTING = ("baseline_recommendations", "leave_last_out")
#: Longest name of a directory for temporary files in which the server's socket has a place.
_LONGEST = 70


def forks() -> bool:
    """Whether steps can be forked: on macOS the system's libraries may have threads by then."""
    return sys.platform == "linux" and len(tempfile.gettempdir()) <= _LONGEST


def uses_models(job: dg.JobDefinition) -> bool:
    """Whether a step of the job, of those selected, takes the device's place or fits."""
    return any(GPU_POOL in node.definition.pools or node.name in FITTING for node in job.nodes)


def preloaded(with_models: bool) -> list[str]:
    """Modules that the server of a run imports."""
    # Who counts the cards of a machine, as libraries may at import, cannot fork and use one.
    # A build of PyTorch for CPUs alone never does.
    cpu_only = importlib.metadata.version("torch").endswith("+cpu")
    return [DEFINITIONS, MODELS] if with_models and cpu_only else [DEFINITIONS]


def forking(config: dict[str, Any], with_models: bool) -> dict[str, Any]:
    """``config`` of Dagster's default executor, with steps forked unless it says otherwise or they
    cannot be."""
    steps = config.get("multiprocess")
    if steps is None or steps.get("start_method") or not forks():
        return config
    start_method = {"forkserver": {"preload_modules": preloaded(with_models)}}
    return {**config, "multiprocess": {**steps, "start_method": start_method}}


@dg.executor(
    name=dg.multi_or_in_process_executor.name,
    config_schema=dg.multi_or_in_process_executor.config_schema.as_field(),
    requirements=dg.multi_or_in_process_executor.get_requirements,
)
def step_executor(init_context: dg.InitExecutorContext) -> dg.Executor:
    """Dagster's default executor; the processes of steps are forked from a server of the run."""
    default = dg.multi_or_in_process_executor.executor_creation_fn
    assert default is not None
    with_models = uses_models(init_context.job.get_definition())
    config = forking(dict(init_context.executor_config), with_models)
    return default(init_context._replace(executor_config=config))
