"""Group ``recommendations``: answers as raw text, then as movie ids, beside classical lists."""

from pathlib import Path

import dagster as dg

from llmrec_assets.ground.stages import policy_problems, response_problems
from llmrec_assets.ground.store import StoredTable
from llmrec_assets.orchestration.assets.common import CODE_VERSION, table_options
from llmrec_assets.orchestration.config import RunConfig
from llmrec_assets.orchestration.partitions import recipe_of, run_partitions
from llmrec_assets.orchestration.progress import report_progress
from llmrec_assets.orchestration.provenance import made_before
from llmrec_assets.orchestration.resources import GPU_POOL, GpuResource, StoreResource
from llmrec_assets.orchestration.results import (
    CheckedResult,
    Frame,
    TableResult,
    blocking_checks,
    checked_table_result,
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


_PROPOSED = "candidates_of_training_users_only"


def _proposed(stage: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        _PROPOSED,
        asset=f"{stage}_responses",
        blocking=True,
        description="Where another recommender proposes what the model ranks: it was fitted on "
        "exactly the training users' events, only validation users chose its hyperparameters, and "
        "what it proposes are distinct unseen catalogue films.",
    )


def _answer_checks(stage: str) -> list[dg.AssetCheckSpec]:
    return [_own_checkpoint(stage), _proposed(stage)]


def _answer(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    gpu: GpuResource,
    prompts: StoredTable,
    user_splits: Frame,
    ratings: Frame,
    catalogue: Frame,
    stage: str,
    base_model: Path,
    *adapters: Path,
) -> CheckedResult:
    """``adapters``: SFT's, then the one trained on top of it."""
    recipe, partition = recipe_of(context), context.partition_key
    problems = policy_problems(stage, base_model, adapters, partition, prompts.version)
    yield from blocking_checks(f"{stage}_responses", {_OWN: problems})
    store = storage.store()

    def reused(table: StoredTable) -> TableResult:
        context.log.info("these answers are already published: reused")
        return table_result(f"{stage}_responses", table.frame, {"reused": True})

    before = None if config.force else made_before(context, store)
    if before is not None:
        yield from blocking_checks(f"{stage}_responses", {_PROPOSED: []})
        yield reused(before)
        return
    from llmrec_assets.ground.answers import answer_versions
    from llmrec_assets.models.answers import answer_test_prompts
    from llmrec_assets.models.classical_lists import ease_candidates

    made, seed = None, config.seed_of(recipe)
    if recipe.generation.candidates == "ease":
        made = ease_candidates(prompts.frame, user_splits, ratings, catalogue, recipe, seed=seed)
    yield from blocking_checks(f"{stage}_responses", {_PROPOSED: made.problems if made else []})
    candidates = made.candidates if made else None
    with gpu.lease_for(context) as lease:
        # Another run may have made them while this one waited.
        if lease.waited_seconds and not config.force:
            before = made_before(context, store)
        if before is None:
            answers = answer_test_prompts(
                prompts.frame,
                ratings,
                catalogue,
                base_model,
                adapters,
                recipe.generation,
                stage=stage,
                prompts_version=prompts.version,
                answer_versions=answer_versions(
                    recipe.generation,
                    seed,
                    CODE_VERSION,
                    candidates.version if candidates else None,
                ),
                max_users=recipe.evaluation.max_test_users,
                top_k=recipe.windows.top_k,
                seed=seed,
                device=lease.device,
                candidates=candidates,
                progress=report_progress(context),
            )
    if before is not None:
        yield reused(before)
        return
    facts = {"reused": False, **answers.facts, **lease.facts()}
    if made:
        told = {**made.candidates.fit, "validation_ndcg": round(made.validation_ndcg, 6)}
        facts = {**facts, "candidates": dg.MetadataValue.json(told)}
    yield table_result(f"{stage}_responses", answers.frame, facts)


@dg.asset(
    **table_options("base_responses", GROUP),
    partitions_def=run_partitions,
    pool=GPU_POOL,
    check_specs=_answer_checks("base"),
)
def base_responses(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    gpu: GpuResource,
    prompts: StoredTable,
    user_splits: Frame,
    ratings: Frame,
    catalogue: Frame,
    base_model: Path,
) -> CheckedResult:
    """What the base model answers to the test prompts, raw."""
    yield from _answer(
        context, config, storage, gpu, prompts, user_splits, ratings, catalogue, "base", base_model
    )


@dg.asset(
    **table_options("sft_responses", GROUP),
    partitions_def=run_partitions,
    pool=GPU_POOL,
    check_specs=_answer_checks("sft"),
)
def sft_responses(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    gpu: GpuResource,
    prompts: StoredTable,
    user_splits: Frame,
    ratings: Frame,
    catalogue: Frame,
    base_model: Path,
    sft_checkpoint: Path,
) -> CheckedResult:
    """What the fine-tuned model answers to the test prompts, raw."""
    yield from _answer(
        context,
        config,
        storage,
        gpu,
        prompts,
        user_splits,
        ratings,
        catalogue,
        "sft",
        base_model,
        sft_checkpoint,
    )


@dg.asset(
    **table_options("dpo_responses", GROUP),
    partitions_def=run_partitions,
    pool=GPU_POOL,
    check_specs=_answer_checks("dpo"),
)
def dpo_responses(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    gpu: GpuResource,
    prompts: StoredTable,
    user_splits: Frame,
    ratings: Frame,
    catalogue: Frame,
    base_model: Path,
    sft_checkpoint: Path,
    dpo_checkpoint: Path,
) -> CheckedResult:
    """What the model after DPO answers to the test prompts, raw."""
    yield from _answer(
        context,
        config,
        storage,
        gpu,
        prompts,
        user_splits,
        ratings,
        catalogue,
        "dpo",
        base_model,
        sft_checkpoint,
        dpo_checkpoint,
    )


@dg.asset(
    **table_options("rlhf_responses", GROUP),
    partitions_def=run_partitions,
    pool=GPU_POOL,
    check_specs=_answer_checks("rlhf"),
)
def rlhf_responses(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    gpu: GpuResource,
    prompts: StoredTable,
    user_splits: Frame,
    ratings: Frame,
    catalogue: Frame,
    base_model: Path,
    sft_checkpoint: Path,
    rlhf_checkpoint: Path,
) -> CheckedResult:
    """What the model after RLHF answers to the test prompts, raw."""
    yield from _answer(
        context,
        config,
        storage,
        gpu,
        prompts,
        user_splits,
        ratings,
        catalogue,
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


_SURVIVES = "catalogue_survives_parsing"


def _surviving_catalogue(stage: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        _SURVIVES,
        asset=f"{stage}_recommendations",
        blocking=True,
        description="Every title of the catalogue, written as an answer and parsed and grounded "
        "again, is that film: no apostrophe, comma or bracket makes a film unreachable.",
    )


_CONTRACT = "keeps_the_contract"


def _contract(stage: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        _CONTRACT,
        asset=f"{stage}_recommendations",
        blocking=True,
        description="Every list decoded over the catalogue has k ranks of distinct catalogue "
        "films, none of them seen. Free text is exempt: what it breaks is counted.",
    )


def _list_checks(stage: str) -> list[dg.AssetCheckSpec]:
    return [_current_answers(stage), _surviving_catalogue(stage), _contract(stage)]


def _ground(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    stage: str,
    responses: Frame,
    prompts: StoredTable,
    ratings: Frame,
    catalogue: Frame,
) -> CheckedResult:
    from llmrec_assets.ground.answers import (
        constrained_problems,
        ground_responses,
        parsing_problems,
        validity,
    )

    recipe = recipe_of(context)
    problems = response_problems(
        responses, stage, storage.store(), context.partition_key, prompts.version
    )
    unread = parsing_problems(catalogue, recipe.grounding)
    yield from blocking_checks(f"{stage}_recommendations", {_CURRENT: problems, _SURVIVES: unread})
    top_k = recipe.windows.top_k
    frame = ground_responses(responses, prompts.frame, ratings, catalogue, recipe.grounding, top_k)
    broken = constrained_problems(frame, prompts.frame, ratings, catalogue, top_k)
    yield from blocking_checks(f"{stage}_recommendations", {_CONTRACT: broken})
    yield table_result(f"{stage}_recommendations", frame, validity(frame))


@dg.asset(
    **table_options("base_recommendations", GROUP),
    partitions_def=run_partitions,
    check_specs=_list_checks("base"),
)
def base_recommendations(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    base_responses: Frame,
    prompts: StoredTable,
    ratings: Frame,
    catalogue: Frame,
) -> CheckedResult:
    """The base model's answers parsed and grounded to the catalogue, k slots a window."""
    yield from _ground(context, storage, "base", base_responses, prompts, ratings, catalogue)


@dg.asset(
    **table_options("sft_recommendations", GROUP),
    partitions_def=run_partitions,
    check_specs=_list_checks("sft"),
)
def sft_recommendations(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    sft_responses: Frame,
    prompts: StoredTable,
    ratings: Frame,
    catalogue: Frame,
) -> CheckedResult:
    """The fine-tuned model's answers parsed and grounded to the catalogue, k slots a window."""
    yield from _ground(context, storage, "sft", sft_responses, prompts, ratings, catalogue)


@dg.asset(
    **table_options("dpo_recommendations", GROUP),
    partitions_def=run_partitions,
    check_specs=_list_checks("dpo"),
)
def dpo_recommendations(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    dpo_responses: Frame,
    prompts: StoredTable,
    ratings: Frame,
    catalogue: Frame,
) -> CheckedResult:
    """The answers after DPO parsed and grounded to the catalogue, k slots a window."""
    yield from _ground(context, storage, "dpo", dpo_responses, prompts, ratings, catalogue)


@dg.asset(
    **table_options("rlhf_recommendations", GROUP),
    partitions_def=run_partitions,
    check_specs=_list_checks("rlhf"),
)
def rlhf_recommendations(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    rlhf_responses: Frame,
    prompts: StoredTable,
    ratings: Frame,
    catalogue: Frame,
) -> CheckedResult:
    """The answers after RLHF parsed and grounded to the catalogue, k slots a window."""
    yield from _ground(context, storage, "rlhf", rlhf_responses, prompts, ratings, catalogue)


@dg.asset(
    **table_options("baseline_recommendations", GROUP),
    partitions_def=run_partitions,
    check_specs=[
        dg.AssetCheckSpec(
            _CONTRACT,
            asset="baseline_recommendations",
            blocking=True,
            description="Every list has k ranks of distinct catalogue films under their canonical "
            "id, none of them already seen (`ranking-shown`: none that the prompt shows).",
        ),
        dg.AssetCheckSpec(
            "fitted_on_training_users_only",
            asset="baseline_recommendations",
            blocking=True,
            description="Every fit used exactly the training users' events, a time-causal one "
            "none after its time, which is not after the cut-offs it answers; only validation "
            "users chose hyperparameters.",
        ),
    ],
)
def baseline_recommendations(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    prompts: StoredTable,
    user_splits: Frame,
    ratings: Frame,
    catalogue: Frame,
) -> CheckedResult:
    """Popularity, ItemKNN, EASE, implicit ALS and SASRec for the same test windows."""
    from llmrec_assets.ground.answers import validity
    from llmrec_assets.models.classical_lists import classical_lists

    recipe = recipe_of(context)
    made = classical_lists(
        prompts.frame,
        user_splits,
        ratings,
        catalogue,
        recipe,
        prompts_version=prompts.version,
        seed=config.seed_of(recipe),
        say=context.log.info,
    )
    yield from checked_table_result(
        "baseline_recommendations",
        made.frame,
        made.problems,
        {
            **validity(made.frame),
            **{name: dg.MetadataValue.json(fact) for name, fact in made.facts.items()},
        },
    )
