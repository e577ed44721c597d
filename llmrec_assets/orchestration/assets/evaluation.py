"""Group ``evaluation``: metrics per user, the metric table, a user's lists, the report."""

from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd

from llmrec_assets.ground import evaluation, recommendations
from llmrec_assets.ground.report import markdown_table, readable
from llmrec_assets.ground.report_inputs import (
    TRAININGS,
    report_inputs,
    self_contained,
    write_report,
)
from llmrec_assets.ground.report_page import build_report
from llmrec_assets.ground.stages import (
    RECOMMENDATION_TABLES,
    current_stages,
    missing_stages,
    require_current,
)
from llmrec_assets.ground.store import StoredTable
from llmrec_assets.orchestration.assets.common import (
    CODE_VERSION,
    directory_options,
    table_options,
)
from llmrec_assets.orchestration.config import ForceConfig, RunConfig
from llmrec_assets.orchestration.partitions import dataset_of, recipe_of, run_partitions
from llmrec_assets.orchestration.resources import StoreResource
from llmrec_assets.orchestration.results import (
    CheckedResult,
    TableResult,
    checkpoint_result,
    table_result,
)

GROUP = "evaluation"


@dg.asset(
    **table_options("user_metrics", GROUP),
    partitions_def=run_partitions,
    deps=RECOMMENDATION_TABLES,
)
def user_metrics(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    prompts: StoredTable,
    movies: pd.DataFrame,
) -> TableResult:
    """NDCG, Precision and Recall per test window, for every stage made from the current prompts."""
    stages = current_stages(storage.store(), context.partition_key, prompts.version)
    for line in stages.left_out:
        context.log.warning(line)
    protocol = recipe_of(context).windows.protocol
    frame = evaluation.user_metrics(stages.recommendations, prompts.frame, movies, protocol)
    return table_result(
        "user_metrics",
        frame,
        {"stages": sorted(set(frame["stage"])), "left_out": stages.left_out or "nothing"},
    )


@dg.asset(**table_options("metric_table", GROUP), partitions_def=run_partitions)
def metric_table(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    prompts: StoredTable,
    user_metrics: pd.DataFrame,
) -> TableResult:
    """One row per stage: metrics with bootstrap intervals, paired differences, validity."""
    recipe = recipe_of(context)
    require_current(
        user_metrics, "user_metrics", storage.store(), context.partition_key, prompts.version
    )
    frame = evaluation.metric_table(
        user_metrics, recipe.evaluation, seed=config.seed_of(recipe), top_k=recipe.windows.top_k
    )
    return table_result(
        "metric_table",
        frame,
        {
            "table": dg.MetadataValue.md(markdown_table(readable(frame))),
            "missing_or_stale_stages": missing_stages(frame) or "none",
            "base_model": recipe.base_model.label,
            **{
                f"ndcg_{row['stage']}_{row['information_set']}": float(row["ndcg"])
                for row in frame.to_dict("records")
            },
        },
    )


@dg.asset(
    **table_options("sample_recommendations", GROUP),
    partitions_def=run_partitions,
    deps=RECOMMENDATION_TABLES,
)
def sample_recommendations(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    prompts: StoredTable,
    interaction_windows: pd.DataFrame,
    catalogue: pd.DataFrame,
) -> TableResult:
    """One test user through the stages, beside the ground truth (paper Table 2)."""
    recipe = recipe_of(context)
    stages = current_stages(storage.store(), context.partition_key, prompts.version)
    frame = recommendations.sample_recommendations(
        prompts.frame,
        interaction_windows,
        catalogue,
        stages.recommendations,
        liked_min=recipe.windows.liked_min,
    )
    return table_result(
        "sample_recommendations",
        frame,
        {"table": dg.MetadataValue.md(markdown_table(frame.drop(columns=["window_index"])))},
    )


@dg.asset(**table_options("leave_last_out", GROUP), partitions_def=run_partitions)
def leave_last_out(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
) -> TableResult:
    """Classical recommenders by the sequential literature's protocol: the last film among all."""
    from llmrec_assets.models.leave_last_out import classical_leave_last_out

    recipe = recipe_of(context)
    result, share_tied = classical_leave_last_out(
        ratings, movies, recipe.leave_last_out, recipe.evaluation, config.seed_of(recipe)
    )
    return table_result(
        "leave_last_out",
        result.frame,
        {
            "table": dg.MetadataValue.md(markdown_table(result.frame)),
            "share_of_users_with_tied_last_films": share_tied,
            "validation_ndcg": dg.MetadataValue.json(result.validation_ndcg),
            **{f"seconds_{name}": round(value, 1) for name, value in result.seconds.items()},
        },
    )


@dg.asset(
    **directory_options("report", GROUP, "markdown", "html"),
    partitions_def=run_partitions,
    deps=[*TRAININGS, "preference_pairs"],
)
def report(
    context: dg.AssetExecutionContext,
    config: ForceConfig,
    storage: StoreResource,
    prompts: StoredTable,
    metric_table: StoredTable,
    sample_recommendations: StoredTable,
) -> CheckedResult:
    """The paper's tables beside ours, one user's lists and the curves, as Markdown and HTML."""
    recipe, store, partition = recipe_of(context), storage.store(), context.partition_key
    require_current(metric_table.frame, "metric_table", store, partition, prompts.version)
    made = report_inputs(store, partition, prompts.version)
    determinants = {
        "metric_table": metric_table.version,
        "sample_recommendations": sample_recommendations.version,
        **made.versions,
        "code": CODE_VERSION,
    }

    def build(work: Path) -> tuple[Path, dict[str, Any]]:
        page = build_report(
            dataset=dataset_of(context),
            recipe_name=recipe.name,
            base_model=recipe.base_model.label,
            metric_table=metric_table.frame,
            sample_recommendations=sample_recommendations.frame,
            facts=made.facts,
            curves=made.curves(),
            generated={},
        )
        return write_report(page, work / "files"), {}

    yield from checkpoint_result(
        context,
        store,
        config,
        determinants,
        build,
        lambda facts: {"report": dg.MetadataValue.md(self_contained(store, partition))},
    )
