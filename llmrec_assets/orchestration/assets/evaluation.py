"""Group ``evaluation``: metrics per user, the metric table, comparisons, what lists are like,
groups of users, a user's lists, the report."""

from pathlib import Path
from typing import Any

import dagster as dg

from llmrec_assets.ground.report_inputs import (
    TABLES,
    TRAININGS,
    report_inputs,
    self_contained,
    write_report,
)
from llmrec_assets.ground.stages import (
    RECOMMENDATION_TABLES,
    RESPONSE_TABLES,
    StageTables,
    answers_behind,
    current_stages,
    missing_stages,
    require_current,
    require_made_from,
)
from llmrec_assets.ground.store import StoredTable
from llmrec_assets.orchestration.assets.common import (
    CODE_VERSION,
    FIGURES_FRESH,
    directory_options,
    table_options,
)
from llmrec_assets.orchestration.config import ForceConfig, RunConfig
from llmrec_assets.orchestration.partitions import dataset_of, recipe_of, run_partitions
from llmrec_assets.orchestration.provenance import note_inputs
from llmrec_assets.orchestration.resources import StoreResource
from llmrec_assets.orchestration.results import (
    CheckedResult,
    Frame,
    TableResult,
    checked_table_result,
    checkpoint_result,
    pictures,
    table_result,
)

GROUP = "evaluation"

SCORES_HOLD = "scores_hold"
_MADE_FROM = "user_metrics_version"
_LIST = ["stage", "decoding", "sees"]


def _current_stages(
    context: dg.AssetExecutionContext, storage: StoreResource, prompts: StoredTable
) -> StageTables:
    from llmrec_assets.ground.answers import baselines_version

    version = baselines_version(recipe_of(context).baselines)
    return current_stages(storage.store(), context.partition_key, prompts.version, version)


def _require_current(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    prompts: StoredTable,
    name: str,
    table: Frame,
) -> None:
    from llmrec_assets.ground.answers import baselines_version

    version = baselines_version(recipe_of(context).baselines)
    partition = context.partition_key
    require_current(table, name, storage.store(), partition, prompts.version, version)


@dg.asset(
    **table_options("user_metrics", GROUP),
    partitions_def=run_partitions,
    deps=RECOMMENDATION_TABLES,
    check_specs=[
        dg.AssetCheckSpec(
            SCORES_HOLD,
            asset="user_metrics",
            blocking=True,
            description="Counted again from the raw ratings: no counted hit was rated by the "
            "cut-off, every list has the recipe's k slots, hits, NDCG, Precision and Recall agree.",
        )
    ],
)
def user_metrics(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    prompts: StoredTable,
    ratings: Frame,
    movies: Frame,
) -> CheckedResult:
    """NDCG, Precision and Recall per test window, for every stage made from the current prompts."""
    from llmrec_assets.ground import evaluation
    from llmrec_assets.ground.score_checks import score_problems

    stages = _current_stages(context, storage, prompts)
    note_inputs(context, stages.versions)
    for line in stages.left_out:
        context.log.warning(line)
    recipe = recipe_of(context)
    frame = evaluation.user_metrics(
        stages.recommendations, prompts.frame, movies, recipe.windows.protocol
    )
    problems = score_problems(
        frame,
        stages.recommendations,
        prompts.frame,
        ratings,
        movies,
        recipe.windows.top_k,
    )
    yield from checked_table_result(
        "user_metrics",
        frame,
        {SCORES_HOLD: problems},
        {"stages": sorted(set(frame["stage"])), "left_out": stages.left_out or "nothing"},
    )


@dg.asset(**table_options("comparisons", GROUP), partitions_def=run_partitions)
def comparisons(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    prompts: StoredTable,
    user_metrics: StoredTable,
) -> TableResult:
    """Paired differences between rows: interval, sign-flip p-value, Holm's correction, power."""
    from llmrec_assets.ground import comparisons as compare
    from llmrec_assets.ground.report import markdown_table, readable_pairs

    recipe = recipe_of(context)
    _require_current(context, storage, prompts, "user_metrics", user_metrics.frame)
    frame = compare.comparisons(
        user_metrics.frame, recipe.evaluation, config.seed_of(recipe), user_metrics.version
    )
    return table_result(
        "comparisons", frame, {"table": dg.MetadataValue.md(markdown_table(readable_pairs(frame)))}
    )


@dg.asset(**table_options("group_metrics", GROUP), partitions_def=run_partitions)
def group_metrics(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    prompts: StoredTable,
    interaction_windows: Frame,
    user_splits: Frame,
    users: Frame,
    ratings: Frame,
    movies: Frame,
    user_metrics: StoredTable,
) -> TableResult:
    """NDCG by age, gender, activity and popularity of the ground truth, for every row."""
    from llmrec_assets.ground.groups import group_metrics as by_group
    from llmrec_assets.ground.groups import user_groups
    from llmrec_assets.ground.recommendations import evaluated_prompts
    from llmrec_assets.ground.splits import temporal_split_time

    recipe = recipe_of(context)
    asked = evaluated_prompts(prompts.frame, recipe.evaluation.max_test_users)
    until = temporal_split_time(ratings, recipe.windows)
    groups = user_groups(asked, interaction_windows, users, ratings, user_splits, movies, until)
    frame = by_group(
        user_metrics.frame,
        groups,
        recipe.evaluation,
        config.seed_of(recipe),
        user_metrics.version,
    )
    left_out = frame.groupby("grouping")["users_left_out"].max().to_dict()
    return table_result("group_metrics", frame, {"users_left_out": left_out})


@dg.asset(
    **table_options("beyond_accuracy", GROUP),
    partitions_def=run_partitions,
    deps=[*RECOMMENDATION_TABLES, *RESPONSE_TABLES],
)
def beyond_accuracy(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    prompts: StoredTable,
    user_splits: Frame,
    ratings: Frame,
    movies: Frame,
) -> TableResult:
    """Coverage, novelty, diversity, popularity bias, calibration and cost of every row's lists."""
    from llmrec_assets.ground import beyond
    from llmrec_assets.ground.splits import temporal_split_time

    recipe, store, partition = recipe_of(context), storage.store(), context.partition_key
    stages = _current_stages(context, storage, prompts)
    answers, versions = answers_behind(store, partition, stages.recommendations)
    note_inputs(context, {**stages.versions, **versions})
    frame = beyond.beyond_accuracy(
        stages.recommendations,
        prompts.frame,
        ratings,
        user_splits,
        movies,
        answers,
        liked_min=recipe.windows.liked_min,
        protocol=recipe.windows.protocol,
        until=temporal_split_time(ratings, recipe.windows),
    )
    return table_result("beyond_accuracy", frame, {"rows": len(frame)})


@dg.asset(
    **table_options("metric_table", GROUP),
    partitions_def=run_partitions,
    freshness_policy=FIGURES_FRESH,
)
def metric_table(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    prompts: StoredTable,
    user_metrics: StoredTable,
    comparisons: Frame,
) -> TableResult:
    """One row per stage: metrics with bootstrap intervals, paired differences, validity."""
    from llmrec_assets.ground import evaluation
    from llmrec_assets.ground.report import VALIDITY, markdown_table, readable
    from llmrec_assets.ground.report_sections import forest_png

    recipe = recipe_of(context)
    _require_current(context, storage, prompts, "user_metrics", user_metrics.frame)
    require_made_from(comparisons, "comparisons", _MADE_FROM, {user_metrics.version})
    frame = evaluation.metric_table(
        user_metrics.frame,
        recipe.evaluation,
        seed=config.seed_of(recipe),
        top_k=recipe.windows.top_k,
        comparisons=comparisons,
    )
    shown = readable(frame)
    return table_result(
        "metric_table",
        frame,
        {
            # Two tables: with all its columns one is wider than the UI's window.
            "table": dg.MetadataValue.md(markdown_table(shown.drop(columns=VALIDITY))),
            "validity": dg.MetadataValue.md(markdown_table(shown[[*_LIST, *VALIDITY]])),
            "plot": pictures(
                {
                    str(name): forest_png(rows)
                    for name, rows in frame.groupby("protocol", sort=False)
                }
            ),
            "missing_or_stale_stages": missing_stages(frame) or "none",
            "base_model": recipe.base_model.label,
            # As numbers: the UI draws them over time.
            **{
                f"ndcg_{row['stage']}_{row['decoding']}_{row['information_set']}": round(
                    float(row["ndcg"]), 4
                )
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
    interaction_windows: Frame,
    catalogue: Frame,
) -> TableResult:
    """One test user through the stages, beside the ground truth (paper Table 2)."""
    from llmrec_assets.ground import recommendations
    from llmrec_assets.ground.report import markdown_table

    recipe = recipe_of(context)
    stages = _current_stages(context, storage, prompts)
    note_inputs(context, stages.versions)
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
    ratings: Frame,
    movies: Frame,
) -> TableResult:
    """Classical recommenders by the sequential literature's protocol: the last film among all."""
    from llmrec_assets.ground.report import markdown_table
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
    deps=[*TRAININGS, "preference_pairs", *TABLES],
)
def report(
    context: dg.AssetExecutionContext,
    config: ForceConfig,
    storage: StoreResource,
    prompts: StoredTable,
    metric_table: StoredTable,
    comparisons: StoredTable,
    beyond_accuracy: StoredTable,
    group_metrics: StoredTable,
    sample_recommendations: StoredTable,
) -> CheckedResult:
    """The paper's tables beside ours, one user's lists and the curves, as Markdown and HTML."""
    from llmrec_assets.ground.report_page import build_report

    recipe, store, partition = recipe_of(context), storage.store(), context.partition_key
    _require_current(context, storage, prompts, "metric_table", metric_table.frame)
    scored = {str(store.current("user_metrics", partition, kind="tables"))}
    require_made_from(comparisons.frame, "comparisons", _MADE_FROM, scored)
    require_made_from(group_metrics.frame, "group_metrics", _MADE_FROM, scored)
    lists = set(metric_table.frame["recommendations_version"])
    require_made_from(beyond_accuracy.frame, "beyond_accuracy", "recommendations_version", lists)
    made = report_inputs(store, partition, prompts.version)
    determinants = {
        "metric_table": metric_table.version,
        "comparisons": comparisons.version,
        "beyond_accuracy": beyond_accuracy.version,
        "group_metrics": group_metrics.version,
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
            comparisons=comparisons.frame,
            beyond_accuracy=beyond_accuracy.frame,
            group_metrics=group_metrics.frame,
            confidence=recipe.evaluation.confidence,
            sample_recommendations=sample_recommendations.frame,
            memorisation=made.tables.get("memorisation"),
            leave_last_out=made.tables.get("leave_last_out"),
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
