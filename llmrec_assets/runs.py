"""Running a whole partition without a daemon: what ``make quickstart`` does.

What belongs here: launching the three jobs in order in this process, against the same instance as
the UI. What does not: what the jobs are (``orchestration.jobs``).
"""

from __future__ import annotations

import os

import dagster as dg
import psutil

from llmrec_assets.definitions import build_defs
from llmrec_assets.ground.errors import RecipeError
from llmrec_assets.ground.recipes import load_recipe
from llmrec_assets.orchestration.partitions import DATASETS

_PID_TAG = "llmrec/pid"
_STARTED_TAG = "llmrec/started"


def run_partition(
    dataset: str,
    recipe: str,
    *,
    force: bool = False,
    seed: int | None = None,
    instance: dg.DagsterInstance | None = None,
    defs: dg.Definitions | None = None,
) -> list[str]:
    """Materializes everything for ``dataset | recipe``; returns the run ids.

    Raises:
        RecipeError: unknown data set or recipe.
        Exception: whatever the failing step raised.
    """
    if dataset not in DATASETS:
        raise RecipeError(f"no data set named {dataset!r}: known are {', '.join(DATASETS)}")
    load_recipe(recipe)
    defs = defs or build_defs()
    instance = instance or dg.DagsterInstance.get()
    bury_dead_runs(instance)
    me = psutil.Process()
    tags = {_PID_TAG: str(me.pid), _STARTED_TAG: str(me.create_time())}
    run_ids = []
    for job_name, partition in (
        ("source_data", dataset),
        ("prepare_base_model", recipe),
        ("recommender", f"{dataset}|{recipe}"),
    ):
        job = defs.resolve_job_def(job_name)
        configured = _config(defs, job, force=force and job_name == "recommender", seed=seed)
        result = job.execute_in_process(
            instance=instance, partition_key=partition, run_config=configured, tags=tags
        )
        run_ids.append(result.run_id)
    return run_ids


def _config(
    defs: dg.Definitions, job: dg.JobDefinition, *, force: bool, seed: int | None
) -> dict[str, object]:
    logs = {"loggers": {"console": {"config": {"log_level": "INFO"}}}}
    values = {} if seed is None else {"seed": seed}
    if force:
        values["force"] = True
    if not values:
        return logs
    configurable = [
        node.name for node in job.nodes if node.definition.config_schema.config_type.has_fields
    ]
    return {**logs, "ops": {name: {"config": values} for name in configurable}}


def bury_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Fails runs whose process is gone and frees the pool slots they hold; returns their ids.

    Run monitoring does this for runs that the daemon launched. A run of this command that was
    killed would otherwise hold the GPU's slot for ever.
    """
    buried = []
    unfinished = dg.RunsFilter(
        statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING],
    )
    for run in instance.get_runs(filters=unfinished):
        pid, started = run.tags.get(_PID_TAG), run.tags.get(_STARTED_TAG)
        if pid is None or started is None or _alive(int(pid), float(started)):
            continue
        instance.report_run_failed(run, "the process that ran it is gone (killed?)")
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        buried.append(run.run_id)
    return buried


def _alive(pid: int, started: float) -> bool:
    """Whether that very process lives: a pid alone may have been given to another since."""
    if pid == os.getpid():
        return True
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1.0
    except psutil.Error:
        return False
