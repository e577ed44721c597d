"""Group ``models``: the base model and the checkpoints trained from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from llmrec_assets.ground.model_files import fingerprint
from llmrec_assets.ground.store import StoredTable
from llmrec_assets.orchestration.assets.common import CODE_VERSION, directory_options
from llmrec_assets.orchestration.config import ForceConfig, RunConfig
from llmrec_assets.orchestration.partitions import (
    recipe_of,
    recipe_partitions,
    run_partitions,
)
from llmrec_assets.orchestration.progress import report_progress
from llmrec_assets.orchestration.resources import GPU_POOL, GpuResource, StoreResource
from llmrec_assets.orchestration.results import checkpoint_result, curve

GROUP = "models"


@dg.asset(
    **directory_options("base_model", GROUP, "huggingface", "safetensors"),
    partitions_def=recipe_partitions,
)
def base_model(
    context: dg.AssetExecutionContext, config: ForceConfig, storage: StoreResource
) -> dg.MaterializeResult[Path]:
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
    return checkpoint_result(context, storage.store(), config, determinants, build)


@dg.asset(
    **directory_options("sft_checkpoint", GROUP, "pytorch", "safetensors"),
    partitions_def=run_partitions,
    pool=GPU_POOL,
)
def sft_checkpoint(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    gpu: GpuResource,
    prompts: StoredTable,
    base_model: Path,
) -> dg.MaterializeResult[Path]:
    """LoRA adapter fine-tuned on the training users' ground truth (paper §3.3)."""
    recipe = recipe_of(context)
    determinants = {
        "base_model": base_model.name,
        "prompts": prompts.version,
        "recipe": recipe.sft.model_dump(),
        "seed": config.seed_of(recipe),
        "code": CODE_VERSION,
    }

    def build(work: Path) -> tuple[Path, dict[str, Any]]:
        from llmrec_assets.models.sft import train_sft_on_prompts

        with gpu.lease(context.log, f"sft_checkpoint {context.partition_key}") as device:
            return train_sft_on_prompts(
                base_model,
                prompts.frame,
                recipe.sft,
                seed=config.seed_of(recipe),
                work_dir=work,
                device=device,
                progress=report_progress(context),
            )

    def describe(facts: Mapping[str, Any]) -> dict[str, Any]:
        expected = recipe.expected_peak_memory_gb
        return {"expected_peak_memory_gb": expected, **describe_training(facts)}

    return checkpoint_result(context, storage.store(), config, determinants, build, describe)


def describe_training(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A training's facts as metadata, its losses as a picture."""
    shown = {name: value for name, value in facts.items() if name not in ("losses", "libraries")}
    return {
        **shown,
        "libraries": dg.MetadataValue.json(facts["libraries"]),
        "loss": curve(facts["losses"], x="step", y="training loss"),
    }
