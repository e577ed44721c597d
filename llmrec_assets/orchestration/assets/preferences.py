"""Group ``preferences``: what the SFT policy samples, and which samples are preferred."""

from pathlib import Path

import dagster as dg

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.plots import histogram
from llmrec_assets.ground.stages import require_checkpoint, require_sampled_from
from llmrec_assets.ground.store import Store, StoredTable, checkpoint_version
from llmrec_assets.orchestration.assets.common import CODE_VERSION, table_options
from llmrec_assets.orchestration.config import RunConfig
from llmrec_assets.orchestration.partitions import recipe_of, run_partitions
from llmrec_assets.orchestration.progress import report_progress
from llmrec_assets.orchestration.provenance import keep_provenance
from llmrec_assets.orchestration.resources import GPU_POOL, GpuResource, StoreResource
from llmrec_assets.orchestration.results import (
    CheckedResult,
    Frame,
    checked_table_result,
    one_builder,
    picture,
    table_result,
)

GROUP = "preferences"


@dg.asset(**table_options("sampled_responses", GROUP), partitions_def=run_partitions, pool=GPU_POOL)
def sampled_responses(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    gpu: GpuResource,
    prompts: StoredTable,
    base_model: Path,
    sft_checkpoint: Path,
) -> CheckedResult:
    """Distinct samples of the SFT policy for training and validation prompts (paper §3.4)."""
    from llmrec_assets.ground.sampled import engine_version

    recipe, store, partition = recipe_of(context), storage.store(), context.partition_key
    on_sft = {"base_model": base_model.name, "prompts": prompts.version}
    require_checkpoint(base_model, "base_model", recipe.name, {})
    require_checkpoint(sft_checkpoint, "sft_checkpoint", partition, on_sft)
    version = checkpoint_version(
        "sampled_responses",
        {
            **on_sft,
            "sft_checkpoint": sft_checkpoint.name,
            "recipe": recipe.sampling.model_dump(),
            **engine_version(recipe.sampling.engine),
            "seed": config.seed_of(recipe),
            "code": CODE_VERSION,
        },
    )
    with one_builder(store, "sampled_responses", partition, context.log.info):
        work = store.work_directory("sampled_responses", partition, version)
        if config.force:
            store.remove_work(work)
            work = store.work_directory("sampled_responses", partition, version)
        published = None if config.force else _published(store, partition, version)
        if published is not None:
            context.log.info("these samples are already published: reused")
            store.remove_work(work)
            keep_provenance(context, store, published.version)
            yield table_result("sampled_responses", published.frame, {"reused": True})
            return
        from llmrec_assets.models.sampled import sample_responses

        with store.writing(), gpu.lease_for(context) as lease:
            frame, facts = sample_responses(
                prompts.frame,
                base_model,
                [sft_checkpoint],
                recipe.sampling,
                prompts_version=prompts.version,
                sampling_version=version,
                seed=config.seed_of(recipe),
                work_dir=work,
                device=lease.device,
                progress=report_progress(context),
            )
        yield table_result("sampled_responses", frame, {"reused": False, **facts, **lease.facts()})
        # Reached once the table is published: until then the batches are all there is.
        store.remove_work(work)


def _published(store: Store, partition: str, version: str) -> StoredTable | None:
    """The current samples where they are those of ``version``; a damaged table is none."""
    try:
        table = store.read_table("sampled_responses", partition)
    except StoreError:
        return None
    return table if set(table.frame["sampling_version"]) == {version} else None


@dg.asset(
    **table_options("preference_pairs", GROUP),
    partitions_def=run_partitions,
    check_specs=[
        dg.AssetCheckSpec(
            "pairs_keep_the_split",
            asset="preference_pairs",
            blocking=True,
            description="Training pairs are of training users, validation pairs of validation "
            "users, no test user stands in any, and the chosen response scores higher.",
        )
    ],
)
def preference_pairs(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    sampled_responses: Frame,
    prompts: StoredTable,
    ratings: Frame,
    catalogue: Frame,
    user_splits: Frame,
    sft_checkpoint: Path,
) -> CheckedResult:
    """Samples compared by NDCG@k: the better is chosen, ties are dropped (paper §3.4)."""
    from llmrec_assets.ground import preferences as pairs
    from llmrec_assets.ground.scoring import ResponseScorer

    recipe = recipe_of(context)
    require_sampled_from(sampled_responses, sft_checkpoint.name, prompts.version)
    scorer = ResponseScorer(
        prompts.frame, ratings, catalogue, recipe.grounding, recipe.windows.top_k
    )
    frame, report = pairs.preference_pairs(
        sampled_responses,
        scorer,
        prompts.frame,
        recipe.preferences,
        seed=config.seed_of(recipe),
    )
    k = recipe.windows.top_k
    yield from checked_table_result(
        "preference_pairs",
        frame,
        {"pairs_keep_the_split": pairs.problems(frame, user_splits)},
        {
            **report.facts(),
            "scores": picture(
                histogram(report.scores, x=f"NDCG@{k} of a sample", y="samples"), "scores"
            ),
        },
    )
