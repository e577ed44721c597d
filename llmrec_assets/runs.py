"""Running a whole partition without a daemon: what ``make quickstart`` does.

What belongs here: launching the jobs in order in this process, against the same instance as the
UI. What does not: what the jobs are (``orchestration.jobs``).
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import dagster as dg

from llmrec_assets.definitions import build_defs
from llmrec_assets.ground import surroundings
from llmrec_assets.ground.errors import LlmrecError, RecipeError
from llmrec_assets.ground.recipes import load_recipe
from llmrec_assets.ground.recommendations import STAGE_ORDER
from llmrec_assets.ground.stages import answered_stages
from llmrec_assets.orchestration.dead_runs import (
    bury_dead_runs,
    burying_dead_runs,
    tags_of_this_process,
)
from llmrec_assets.orchestration.partitions import DATASETS
from llmrec_assets.orchestration.schedules import training_job

#: Assets that take ``RunConfig``. Only these are configured: the source and the base model know
#: no seed, and forcing a run means training again, not converting again.
CONFIGURABLE = {
    "base_responses",
    "baseline_recommendations",
    "comparisons",
    "dpo_checkpoint",
    "dpo_responses",
    "group_metrics",
    "interaction_windows",
    "leave_last_out",
    "memorisation",
    "metric_table",
    "preference_pairs",
    "reward_model",
    "rlhf_checkpoint",
    "rlhf_responses",
    "sampled_responses",
    "sft_checkpoint",
    "sft_responses",
    "user_splits",
}


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

    A data set that the recipe does not align stops at SFT.

    Raises:
        RecipeError: unknown data set or recipe.
        LlmrecError: a blocking check failed.
        Exception: whatever else the failing step raised.
    """
    if dataset not in DATASETS:
        raise RecipeError(f"no data set named {dataset!r}: known are {', '.join(DATASETS)}")
    job = training_job(dataset, recipe)
    defs = defs or build_defs()
    instance = instance or dg.DagsterInstance.get()
    bury_dead_runs(instance)
    run_ids = []
    for job_name, partition in (
        ("source_data", dataset),
        ("prepare_base_model", recipe),
        (job, f"{dataset}|{recipe}"),
    ):
        run_ids.append(_run(defs, job_name, partition, instance, force=force, seed=seed))
    return run_ids


def evaluate_partition(
    dataset: str,
    recipe: str,
    *,
    seed: int | None = None,
    instance: dg.DagsterInstance | None = None,
    defs: dg.Definitions | None = None,
) -> str:
    """Scores what ``dataset | recipe`` has answered, without a model; returns the run id.

    Runs the job ``evaluation`` on every stage whose answers are current; the others are named.

    Raises:
        RecipeError: unknown data set or recipe.
        LlmrecError: there are no prompts yet, or a blocking check failed.
        Exception: whatever else the failing step raised.
    """
    if dataset not in DATASETS:
        raise RecipeError(f"no data set named {dataset!r}: known are {', '.join(DATASETS)}")
    load_recipe(recipe)
    defs = defs or build_defs()
    instance = instance or dg.DagsterInstance.get()
    bury_dead_runs(instance)
    partition = f"{dataset}|{recipe}"
    store = (defs.resources or {})["storage"].store()
    stages, left_out = answered_stages(store, partition)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    silent = {
        dg.AssetKey(f"{stage}_recommendations") for stage in STAGE_ORDER if stage not in stages
    }
    keys = defs.resolve_job_def("evaluation").asset_layer.executable_asset_keys
    selection = sorted(set(keys) - silent)
    return _run(defs, "evaluation", partition, instance, seed=seed, selection=selection)


def promote(
    dataset: str,
    *,
    challenger: str | None = None,
    stage: str | None = None,
    roll_back_to: str | None = None,
    force: bool = False,
    instance: dg.DagsterInstance | None = None,
    defs: dg.Definitions | None = None,
) -> str:
    """Lets a recipe challenge the champion of ``dataset``, or rolls back; returns the run id.

    Args:
        challenger: a recipe, ``stage`` of which challenges (default: its ``promotion.stage``).
        roll_back_to: version of an earlier champion.
        force: decides again what was decided.

    Raises:
        RecipeError: unknown data set, recipe or stage.
        LlmrecError: nothing to challenge with or to go back to, or a blocking check failed.
        Exception: whatever else the failing step raised.
    """
    if dataset not in DATASETS:
        raise RecipeError(f"no data set named {dataset!r}: known are {', '.join(DATASETS)}")
    asked = {"challenger": challenger, "stage": stage, "roll_back_to": roll_back_to, "force": force}
    config = {name: value for name, value in asked.items() if value}
    instance = instance or dg.DagsterInstance.get()
    bury_dead_runs(instance)
    defs = defs or build_defs()
    return _run(defs, "promotion", dataset, instance, config={"champion": config})


def _run(
    defs: dg.Definitions,
    job_name: str,
    partition: str,
    instance: dg.DagsterInstance,
    *,
    force: bool = False,
    seed: int | None = None,
    selection: list[dg.AssetKey] | None = None,
    config: dict[str, dict[str, Any]] | None = None,
) -> str:
    """One job in this process, ``selection`` of it or all; returns the run id. ``config``: of steps
    by name, in place of ``force`` and ``seed``."""
    job = defs.resolve_job_def(job_name).with_logger_defs({"console": terminal})
    run_config = _config(job, force=force, seed=seed, selection=selection)
    if config is not None:
        run_config["ops"] = {name: {"config": values} for name, values in config.items()}
    surroundings.hold()
    try:
        with burying_dead_runs(instance):
            result = job.execute_in_process(
                instance=instance,
                partition_key=partition,
                run_config=run_config,
                tags=tags_of_this_process(),
                asset_selection=selection,
            )
    except dg.Failure as failure:
        raise LlmrecError(failure.description or f"{job_name} failed") from failure
    return str(result.run_id)


def _config(
    job: dg.JobDefinition,
    *,
    force: bool,
    seed: int | None,
    selection: list[dg.AssetKey] | None = None,
) -> dict[str, Any]:
    config: dict[str, Any] = {"loggers": {"console": {}}}
    values: dict[str, Any] = {}
    if seed is not None:
        values["seed"] = seed
    if force:
        values["force"] = True
    if values:
        keys = selection or job.asset_layer.executable_asset_keys
        names = {key.to_user_string() for key in keys}
        config["ops"] = {name: {"config": values} for name in sorted(names & CONFIGURABLE)}
    return config


class _TerminalFormatter(logging.Formatter):
    """Time, step and message. A failed step's stack trace stays in the event log: whoever called
    ``run_partition`` gets the exception itself."""

    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "dagster_meta", {})
        text = facts.get("orig_message") or record.getMessage()
        where = facts.get("step_key") or facts.get("job_name") or "dagster"
        return f"{self.formatTime(record, '%H:%M:%S')} {where}: {text}"


@dg.logger
def terminal(context: dg.InitLoggerContext) -> logging.Logger:
    """Dagster's console logger without ids and stack traces."""
    handler = logging.StreamHandler()
    handler.setFormatter(_TerminalFormatter())
    logger = logging.Logger("llmrec", level=logging.INFO)
    logger.addHandler(handler)
    return logger
