"""Schedules: what is asked for every week, in which partitions.

What belongs here: the two schedules. What does not: when they are due and what became of a missed
tick (``ticks``), the jobs (``jobs``, ``upkeep``), reacting to changed data at once
(``automation``).
"""

from collections.abc import Iterator, Sequence

import dagster as dg
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from llmrec_assets.ground.recipes import load_recipe, recipe_names
from llmrec_assets.ground.store import Store
from llmrec_assets.orchestration.jobs import recommender, supervised
from llmrec_assets.orchestration.partitions import DATASETS
from llmrec_assets.orchestration.resources import StoreResource
from llmrec_assets.orchestration.ticks import CRON, missed_ticks, timezone
from llmrec_assets.orchestration.upkeep import retention

MISSED_TAG = "llmrec/missed_ticks"


@dg.schedule(
    name="weekly_retraining",
    cron_schedule=CRON["weekly_retraining"],
    execution_timezone=timezone(),
    job=recommender,
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Every Sunday at 4:00 (LLMREC_TIMEZONE, else UTC): every `dataset | recipe` that "
    "has been trained, and in which something is stale, runs again and trains what has changed.",
)
def weekly_retraining(
    context: dg.ScheduleEvaluationContext, storage: StoreResource
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """One run request per trained partition with something stale. Ticks missed before this one go
    along as a tag."""
    due = context.scheduled_execution_time
    missed = ", ".join(map(str, missed_ticks(context.instance, "weekly_retraining", due)))
    if missed:
        context.log.warning(f"ticks that nobody ran: {missed}")
    requested = False
    for partition in trained_partitions(storage.store()):
        selection = _assets(context, partition)
        stale = stale_assets(context, partition, selection)
        if not stale:
            context.log.info(f"{partition}: nothing has changed")
            continue
        context.log.info(f"{partition}: something changed for {', '.join(stale)}")
        requested = True
        yield dg.RunRequest(
            run_key=f"{partition}-{due.isoformat()}",
            partition_key=partition,
            asset_selection=selection,
            tags={"llmrec/why": "weekly"} | ({MISSED_TAG: missed} if missed else {}),
        )
    if not requested:
        yield dg.SkipReason("nothing has changed in any `dataset | recipe` that has been trained")


@dg.schedule(
    name="weekly_retention",
    cron_schedule=CRON["weekly_retention"],
    execution_timezone=timezone(),
    job=retention,
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Every Monday at 4:00 (LLMREC_TIMEZONE, else UTC): removes versions that nothing "
    "kept cites, as `llmrec prune --yes` does.",
)
def weekly_retention(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
    """The job ``retention``, removing what it lists."""
    return dg.RunRequest(run_config={"ops": {"remove_old_versions": {"config": {"remove": True}}}})


def trained_partitions(store: Store) -> list[str]:
    """Every `dataset | recipe` with a published SFT checkpoint, of the recipes that there are."""
    partitions = [f"{dataset}|{recipe}" for dataset in DATASETS for recipe in recipe_names()]
    return [p for p in partitions if store.current("sft_checkpoint", p, "checkpoints")]


def training_job(dataset: str, recipe: str) -> str:
    """The job that takes a partition from prompts to tables: some data sets stop at SFT."""
    aligned = dataset in load_recipe(recipe).aligned_datasets
    return recommender.name if aligned else supervised.name


def stale_assets(
    context: dg.ScheduleEvaluationContext, partition: str, keys: Sequence[dg.AssetKey]
) -> list[str]:
    """Those materialized in the partition whose code, or an input's data version, changed since.

    Dagster's own ``stale_assets_only`` of a run request looks at no partition (1.13): asked here.
    """
    assert context.repository_def is not None
    resolver = CachingStaleStatusResolver(
        context.instance,
        context.repository_def.asset_graph,
        LoadingContextForTest(context.instance),
    )
    return [
        key.to_user_string()
        for key in keys
        if resolver.get_status(key, partition) == StaleStatus.STALE
    ]


def _assets(context: dg.ScheduleEvaluationContext, partition: str) -> list[dg.AssetKey]:
    assert context.repository_def is not None
    job = context.repository_def.get_job(training_job(*partition.split("|")))
    return sorted(job.asset_layer.executable_asset_keys)
