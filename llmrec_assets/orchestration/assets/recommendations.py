"""Group ``recommendations``: answers as raw text, then as movie ids, beside classical lists."""

from pathlib import Path

import dagster as dg
import pandas as pd

from llmrec_assets.ground.answers import answer_versions, ground_responses, validity
from llmrec_assets.ground.baselines import popularity_recommendations
from llmrec_assets.ground.recommendations import evaluated_prompts, seen_sets
from llmrec_assets.ground.stages import (
    CHECKPOINT_OF_STAGE,
    checkpoint_problems,
    response_problems,
)
from llmrec_assets.ground.store import StoredTable
from llmrec_assets.orchestration.assets.common import CODE_VERSION, table_options
from llmrec_assets.orchestration.config import RunConfig
from llmrec_assets.orchestration.partitions import recipe_of, run_partitions
from llmrec_assets.orchestration.progress import report_progress
from llmrec_assets.orchestration.resources import GPU_POOL, GpuResource, StoreResource
from llmrec_assets.orchestration.results import (
    CheckedResult,
    TableResult,
    blocking_checks,
    table_result,
)

GROUP = "recommendations"


_OWN = "answered_by_its_own_checkpoint"


def _own_checkpoint(stage: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        _OWN,
        asset=f"{stage}_responses",
        blocking=True,
        description="The checkpoint is the one this stage published, from the current prompts, "
        "base model and SFT checkpoint: no stage is evaluated with another's weights.",
    )


def _answer(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    gpu: GpuResource,
    prompts: StoredTable,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    stage: str,
    base_model: Path,
    *adapters: Path,
) -> CheckedResult:
    """``adapters``: SFT's, then the one trained on top of it."""
    from llmrec_assets.models.answers import answer_test_prompts

    recipe, partition = recipe_of(context), context.partition_key
    problems = checkpoint_problems(base_model, "base_model", partition.split("|")[-1], {})
    own = CHECKPOINT_OF_STAGE[stage]
    made_from = {"base_model": base_model.name, "prompts": prompts.version}
    chain = [] if stage == "base" else list(dict.fromkeys(["sft_checkpoint", own]))
    for asset, adapter in zip(chain, adapters, strict=True):
        problems += checkpoint_problems(adapter, asset, partition, made_from)
        made_from[asset] = adapter.name
    yield from blocking_checks(f"{stage}_responses", {_OWN: problems})
    with gpu.lease(context.log, f"{stage}_responses {partition}") as device:
        answers = answer_test_prompts(
            prompts.frame,
            ratings,
            movies,
            base_model,
            adapters,
            recipe.generation,
            stage=stage,
            prompts_version=prompts.version,
            answer_versions=answer_versions(
                recipe.generation, config.seed_of(recipe), CODE_VERSION
            ),
            max_users=recipe.evaluation.max_test_users,
            top_k=recipe.windows.top_k,
            seed=config.seed_of(recipe),
            device=device,
            progress=report_progress(context),
        )
    yield table_result(f"{stage}_responses", answers.frame, answers.facts)


@dg.asset(
    **table_options("base_responses", GROUP),
    partitions_def=run_partitions,
    pool=GPU_POOL,
    check_specs=[_own_checkpoint("base")],
)
def base_responses(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    gpu: GpuResource,
    prompts: StoredTable,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    base_model: Path,
) -> CheckedResult:
    """What the base model answers to the test prompts, raw."""
    yield from _answer(context, config, gpu, prompts, ratings, movies, "base", base_model)


@dg.asset(
    **table_options("sft_responses", GROUP),
    partitions_def=run_partitions,
    pool=GPU_POOL,
    check_specs=[_own_checkpoint("sft")],
)
def sft_responses(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    gpu: GpuResource,
    prompts: StoredTable,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    base_model: Path,
    sft_checkpoint: Path,
) -> CheckedResult:
    """What the fine-tuned model answers to the test prompts, raw."""
    yield from _answer(
        context, config, gpu, prompts, ratings, movies, "sft", base_model, sft_checkpoint
    )


@dg.asset(
    **table_options("dpo_responses", GROUP),
    partitions_def=run_partitions,
    pool=GPU_POOL,
    check_specs=[_own_checkpoint("dpo")],
)
def dpo_responses(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    gpu: GpuResource,
    prompts: StoredTable,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    base_model: Path,
    sft_checkpoint: Path,
    dpo_checkpoint: Path,
) -> CheckedResult:
    """What the model after DPO answers to the test prompts, raw."""
    yield from _answer(
        context,
        config,
        gpu,
        prompts,
        ratings,
        movies,
        "dpo",
        base_model,
        sft_checkpoint,
        dpo_checkpoint,
    )


@dg.asset(
    **table_options("rlhf_responses", GROUP),
    partitions_def=run_partitions,
    pool=GPU_POOL,
    check_specs=[_own_checkpoint("rlhf")],
)
def rlhf_responses(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    gpu: GpuResource,
    prompts: StoredTable,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    base_model: Path,
    sft_checkpoint: Path,
    rlhf_checkpoint: Path,
) -> CheckedResult:
    """What the model after RLHF answers to the test prompts, raw."""
    yield from _answer(
        context,
        config,
        gpu,
        prompts,
        ratings,
        movies,
        "rlhf",
        base_model,
        sft_checkpoint,
        rlhf_checkpoint,
    )


_CURRENT = "answers_of_the_current_checkpoint"


def _current_answers(stage: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        _CURRENT,
        asset=f"{stage}_recommendations",
        blocking=True,
        description="The answers are of this stage, and of its current checkpoint.",
    )


def _ground(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    stage: str,
    responses: pd.DataFrame,
    prompts: StoredTable,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
) -> CheckedResult:
    recipe = recipe_of(context)
    problems = response_problems(
        responses, stage, storage.store(), context.partition_key, prompts.version
    )
    yield from blocking_checks(f"{stage}_recommendations", {_CURRENT: problems})
    frame = ground_responses(
        responses, prompts.frame, ratings, movies, recipe.grounding, recipe.windows.top_k
    )
    yield table_result(f"{stage}_recommendations", frame, validity(frame))


@dg.asset(
    **table_options("base_recommendations", GROUP),
    partitions_def=run_partitions,
    check_specs=[_current_answers("base")],
)
def base_recommendations(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    base_responses: pd.DataFrame,
    prompts: StoredTable,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
) -> CheckedResult:
    """The base model's answers parsed and grounded to the catalogue, k slots a window."""
    yield from _ground(context, storage, "base", base_responses, prompts, ratings, movies)


@dg.asset(
    **table_options("sft_recommendations", GROUP),
    partitions_def=run_partitions,
    check_specs=[_current_answers("sft")],
)
def sft_recommendations(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    sft_responses: pd.DataFrame,
    prompts: StoredTable,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
) -> CheckedResult:
    """The fine-tuned model's answers parsed and grounded to the catalogue, k slots a window."""
    yield from _ground(context, storage, "sft", sft_responses, prompts, ratings, movies)


@dg.asset(
    **table_options("dpo_recommendations", GROUP),
    partitions_def=run_partitions,
    check_specs=[_current_answers("dpo")],
)
def dpo_recommendations(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    dpo_responses: pd.DataFrame,
    prompts: StoredTable,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
) -> CheckedResult:
    """The answers after DPO parsed and grounded to the catalogue, k slots a window."""
    yield from _ground(context, storage, "dpo", dpo_responses, prompts, ratings, movies)


@dg.asset(
    **table_options("rlhf_recommendations", GROUP),
    partitions_def=run_partitions,
    check_specs=[_current_answers("rlhf")],
)
def rlhf_recommendations(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    rlhf_responses: pd.DataFrame,
    prompts: StoredTable,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
) -> CheckedResult:
    """The answers after RLHF parsed and grounded to the catalogue, k slots a window."""
    yield from _ground(context, storage, "rlhf", rlhf_responses, prompts, ratings, movies)


@dg.asset(**table_options("baseline_recommendations", GROUP), partitions_def=run_partitions)
def baseline_recommendations(
    context: dg.AssetExecutionContext,
    prompts: StoredTable,
    user_splits: pd.DataFrame,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
) -> TableResult:
    """Popularity among the training users' liked films, for the same test windows."""
    recipe = recipe_of(context)
    test_prompts = evaluated_prompts(prompts.frame, recipe.evaluation.max_test_users)
    frame = popularity_recommendations(
        ratings,
        user_splits,
        test_prompts,
        seen_sets(test_prompts, ratings, movies),
        movies,
        liked_min=recipe.windows.liked_min,
        top_k=recipe.windows.top_k,
        prompts_version=prompts.version,
    )
    return table_result("baseline_recommendations", frame, validity(frame))
