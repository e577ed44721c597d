"""Group ``models``: the base model and the checkpoints trained from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from llmrec_assets.ground.model_files import fingerprint
from llmrec_assets.ground.plots import curves_plot
from llmrec_assets.ground.recipes import Recipe
from llmrec_assets.ground.space import require_space, training_space
from llmrec_assets.ground.stages import (
    require_checkpoint,
    require_sampled_from,
    trained_user_problems,
)
from llmrec_assets.ground.store import StoredTable, read_manifest
from llmrec_assets.orchestration.assets.common import CODE_VERSION, directory_options
from llmrec_assets.orchestration.config import ForceConfig, RunConfig
from llmrec_assets.orchestration.partitions import (
    recipe_of,
    recipe_partitions,
    run_partitions,
)
from llmrec_assets.orchestration.progress import report_progress
from llmrec_assets.orchestration.resources import GPU_POOL, GpuResource, StoreResource
from llmrec_assets.orchestration.results import (
    CheckedResult,
    Frame,
    checkpoint_result,
    curve,
    picture,
)

GROUP = "models"


def _trained_on_train(asset: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        _TRAIN_ONLY,
        asset=asset,
        blocking=True,
        description="Every user the training saw is a training user of the current split.",
    )


_TRAIN_ONLY = "trained_on_training_users_only"


def _train_only(facts: Mapping[str, Any], user_splits: Frame) -> dict[str, list[str]]:
    return {_TRAIN_ONLY: trained_user_problems(facts.get("trained_user_ids"), user_splits)}


@dg.asset(
    **directory_options("base_model", GROUP, "huggingface", "safetensors"),
    partitions_def=recipe_partitions,
)
def base_model(
    context: dg.AssetExecutionContext, config: ForceConfig, storage: StoreResource
) -> CheckedResult:
    """The base LLM with tokenizer and chat template, converted once to safetensors."""
    recipe = recipe_of(context).base_model

    def build(work: Path) -> tuple[Path, dict[str, Any]]:
        from llmrec_assets.models.base import prepare_base_model

        return prepare_base_model(recipe, work / "files")

    determinants = {
        "recipe": recipe.model_dump(),
        "source_sha256": fingerprint(recipe),
        "code": CODE_VERSION,
    }
    yield from checkpoint_result(context, storage.store(), config, determinants, build)


@dg.asset(
    **directory_options("sft_checkpoint", GROUP, "pytorch", "safetensors"),
    partitions_def=run_partitions,
    pool=GPU_POOL,
    check_specs=[_trained_on_train("sft_checkpoint")],
)
def sft_checkpoint(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    gpu: GpuResource,
    prompts: StoredTable,
    user_splits: Frame,
    base_model: Path,
) -> CheckedResult:
    """LoRA adapter fine-tuned on the training users' ground truth (paper §3.3)."""
    recipe = recipe_of(context)
    require_checkpoint(base_model, "base_model", recipe.name, {})
    determinants = {
        "base_model": base_model.name,
        "prompts": prompts.version,
        "recipe": recipe.sft.model_dump(),
        "seed": config.seed_of(recipe),
        "code": CODE_VERSION,
    }

    def build(work: Path) -> tuple[Path, dict[str, Any]]:
        _require_space(context, work, base_model, recipe.sft.lora.r)
        from llmrec_assets.models.sft import train_sft_on_prompts

        with gpu.lease_for(context) as lease:
            adapter_dir, facts = train_sft_on_prompts(
                base_model,
                prompts.frame,
                recipe.sft,
                seed=config.seed_of(recipe),
                work_dir=work,
                device=lease.device,
                progress=report_progress(context),
            )
        return adapter_dir, {**facts, **lease.facts()}

    yield from checkpoint_result(
        context,
        storage.store(),
        config,
        determinants,
        build,
        lambda facts: {
            "loss": curve(facts["losses"], x="step", y="training loss"),
            **_describe(facts),
            "expected_peak_memory_gb": recipe.expected_peak_memory_gb,
        },
        lambda facts: _train_only(facts, user_splits),
    )


@dg.asset(
    **directory_options("dpo_checkpoint", GROUP, "pytorch", "safetensors"),
    partitions_def=run_partitions,
    pool=GPU_POOL,
    check_specs=[_trained_on_train("dpo_checkpoint")],
)
def dpo_checkpoint(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    gpu: GpuResource,
    prompts: StoredTable,
    preference_pairs: StoredTable,
    user_splits: Frame,
    base_model: Path,
    sft_checkpoint: Path,
) -> CheckedResult:
    """LoRA adapter on the SFT policy, trained by direct preference optimisation (paper §3.4)."""
    recipe = recipe_of(context)
    determinants = _on_pairs(
        context, recipe, config, prompts, preference_pairs, base_model, sft_checkpoint
    )
    determinants["recipe"] = recipe.dpo.model_dump()

    def build(work: Path) -> tuple[Path, dict[str, Any]]:
        _require_space(context, work, base_model, recipe.dpo.lora.r)
        from llmrec_assets.models.dpo import train_dpo_on_pairs

        with gpu.lease_for(context) as lease:
            adapter_dir, facts = train_dpo_on_pairs(
                base_model,
                sft_checkpoint,
                prompts.frame,
                preference_pairs.frame,
                recipe.dpo,
                seed=config.seed_of(recipe),
                work_dir=work,
                device=lease.device,
                progress=report_progress(context),
            )
        return adapter_dir, {**facts, **lease.facts()}

    yield from checkpoint_result(
        context,
        storage.store(),
        config,
        determinants,
        build,
        _describe,
        lambda facts: _train_only(facts, user_splits),
    )


@dg.asset(
    **directory_options("reward_model", GROUP, "pytorch", "safetensors"),
    partitions_def=run_partitions,
    pool=GPU_POOL,
    check_specs=[
        _trained_on_train("reward_model"),
        dg.AssetCheckSpec(
            "ranks_validation_pairs",
            asset="reward_model",
            description="The accuracy on validation pairs is above one half by its interval. "
            "Warns: a reward model that fails it gives PPO noise to climb.",
        ),
    ],
)
def reward_model(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    gpu: GpuResource,
    prompts: StoredTable,
    preference_pairs: StoredTable,
    user_splits: Frame,
    base_model: Path,
    sft_checkpoint: Path,
) -> CheckedResult:
    """Classifier of prompt and response on the SFT policy, trained on pairs (paper §3.5)."""
    recipe = recipe_of(context)
    determinants = _on_pairs(
        context, recipe, config, prompts, preference_pairs, base_model, sft_checkpoint
    )
    determinants["recipe"] = recipe.reward.model_dump()
    determinants["interval"] = [recipe.evaluation.resamples, recipe.evaluation.confidence]

    def build(work: Path) -> tuple[Path, dict[str, Any]]:
        _require_space(context, work, base_model, recipe.reward.lora.r)
        from llmrec_assets.models.reward import train_reward_on_pairs

        with gpu.lease_for(context) as lease:
            adapter_dir, facts = train_reward_on_pairs(
                base_model,
                sft_checkpoint,
                prompts.frame,
                preference_pairs.frame,
                recipe.reward,
                evaluation=recipe.evaluation,
                seed=config.seed_of(recipe),
                work_dir=work,
                device=lease.device,
                progress=report_progress(context),
            )
        return adapter_dir, {**facts, **lease.facts()}

    for result in checkpoint_result(
        context,
        storage.store(),
        config,
        determinants,
        build,
        _describe,
        lambda facts: _train_only(facts, user_splits),
    ):
        if isinstance(result, dg.MaterializeResult):
            yield _ranks_validation_pairs(read_manifest(result.value)["facts"]["validation"])
        yield result


def _ranks_validation_pairs(validation: Mapping[str, Any] | None) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="ranks_validation_pairs",
        passed=validation is not None and validation["accuracy_low"] > 0.5,
        severity=dg.AssetCheckSeverity.WARN,
        metadata=dict(validation) if validation else {"pairs": 0},
    )


@dg.asset(
    **directory_options("rlhf_checkpoint", GROUP, "pytorch", "safetensors"),
    partitions_def=run_partitions,
    pool=GPU_POOL,
    check_specs=[_trained_on_train("rlhf_checkpoint")],
)
def rlhf_checkpoint(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    gpu: GpuResource,
    prompts: StoredTable,
    ratings: StoredTable,
    catalogue: StoredTable,
    user_splits: Frame,
    base_model: Path,
    sft_checkpoint: Path,
    reward_model: Path,
) -> CheckedResult:
    """LoRA adapter on the SFT policy, trained by PPO against the reward model (paper §3.5)."""
    recipe = recipe_of(context)
    partition = context.partition_key
    require_checkpoint(base_model, "base_model", recipe.name, {})
    on_sft = {"base_model": base_model.name, "prompts": prompts.version}
    require_checkpoint(sft_checkpoint, "sft_checkpoint", partition, on_sft)
    on_reward = {**on_sft, "sft_checkpoint": sft_checkpoint.name}
    require_checkpoint(reward_model, "reward_model", partition, on_reward)
    determinants: dict[str, Any] = {
        **on_reward,
        "reward_model": reward_model.name,
        "recipe": recipe.rlhf.model_dump(),
        "seed": config.seed_of(recipe),
        "code": CODE_VERSION,
    }
    scorer = None
    if recipe.rlhf.reward == "ndcg":
        from llmrec_assets.ground.scoring import ResponseScorer

        determinants |= {
            "ratings": ratings.version,
            "catalogue": catalogue.version,
            "grounding": recipe.grounding.model_dump(),
            "top_k": recipe.windows.top_k,
        }
        scorer = ResponseScorer(
            prompts.frame,
            ratings.frame,
            catalogue.frame,
            recipe.grounding,
            recipe.windows.top_k,
        )

    def build(work: Path) -> tuple[Path, dict[str, Any]]:
        # PPO also trains a value adapter.
        _require_space(context, work, base_model, recipe.rlhf.lora.r, recipe.rlhf.lora.r)
        with gpu.lease_for(context) as lease:
            common: dict[str, Any] = {
                "scorer": scorer,
                "seed": config.seed_of(recipe),
                "work_dir": work,
                "device": lease.device,
                "progress": report_progress(context),
            }
            if recipe.rlhf.method == "ppo":
                from llmrec_assets.models.ppo import train_ppo

                adapter_dir, facts = train_ppo(
                    base_model,
                    sft_checkpoint,
                    prompts.frame,
                    recipe.rlhf,
                    reward_dir=reward_model,
                    **common,
                )
            else:
                from llmrec_assets.models.group_rl import train_group_rl

                adapter_dir, facts = train_group_rl(
                    base_model, sft_checkpoint, prompts.frame, recipe.rlhf, **common
                )
        return adapter_dir, {**facts, **lease.facts()}

    yield from checkpoint_result(
        context,
        storage.store(),
        config,
        determinants,
        build,
        _describe,
        lambda facts: _train_only(facts, user_splits),
    )


def _on_pairs(
    context: dg.AssetExecutionContext,
    recipe: Recipe,
    config: RunConfig,
    prompts: StoredTable,
    pairs: StoredTable,
    base_model: Path,
    sft_checkpoint: Path,
) -> dict[str, Any]:
    """Determinants of a training on pairs, after checking that its inputs belong together."""
    require_checkpoint(base_model, "base_model", recipe.name, {})
    on_sft = {"base_model": base_model.name, "prompts": prompts.version}
    require_checkpoint(sft_checkpoint, "sft_checkpoint", context.partition_key, on_sft)
    require_sampled_from(pairs.frame, sft_checkpoint.name, prompts.version, "preference_pairs")
    return {
        **on_sft,
        "sft_checkpoint": sft_checkpoint.name,
        "preference_pairs": pairs.version,
        "seed": config.seed_of(recipe),
        "code": CODE_VERSION,
    }


def _require_space(
    context: dg.AssetExecutionContext, work: Path, base_model: Path, *ranks: int
) -> None:
    what = f"training {context.asset_key.to_user_string()} for {context.partition_key}"
    require_space(work, training_space(base_model, *ranks), what)


def _describe(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A training's facts as metadata, its curves as pictures. The run and the libraries stand in
    the record of where it comes from."""
    hidden = ("losses", "curves", "libraries", "run_id", "trained_user_ids")
    described: dict[str, Any] = {}
    if facts.get("curves"):
        described["curves"] = picture(curves_plot(facts["curves"], x="step"), "curves")
    for name, value in facts.items():
        if name not in hidden:
            is_nested = isinstance(value, (dict, list))
            described[name] = dg.MetadataValue.json(value) if is_nested else value
    described["trained_users"] = len(facts.get("trained_user_ids") or [])
    return described
