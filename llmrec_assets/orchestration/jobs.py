"""Jobs: one per partition shape, so that a launch needs a partition and nothing else."""

from __future__ import annotations

import dagster as dg

from llmrec_assets.ground.stages import CHECKPOINT_OF_STAGE
from llmrec_assets.orchestration.partitions import (
    dataset_partitions,
    recipe_partitions,
    run_partitions,
)

source_data = dg.define_asset_job(
    "source_data",
    selection=dg.AssetSelection.groups("source"),
    partitions_def=dataset_partitions,
    description="Files, ratings, movies and users of one data set.",
)

prepare_base_model = dg.define_asset_job(
    "prepare_base_model",
    selection=dg.AssetSelection.assets("base_model"),
    partitions_def=recipe_partitions,
    description="The base model of one recipe, converted to safetensors.",
)

_recommender = (
    dg.AssetSelection.all()
    - dg.AssetSelection.groups("source")
    - dg.AssetSelection.assets("base_model")
    - dg.AssetSelection.groups("champion")
)
_alignment = dg.AssetSelection.groups("preferences") | dg.AssetSelection.assets(
    "dpo_checkpoint",
    "reward_model",
    "rlhf_checkpoint",
    "dpo_responses",
    "rlhf_responses",
    "dpo_recommendations",
    "rlhf_recommendations",
)

recommender = dg.define_asset_job(
    "recommender",
    selection=_recommender,
    partitions_def=run_partitions,
    description="A whole `dataset | recipe`: from prompts to the metric table. Needs source_data "
    "for the data set and prepare_base_model for the recipe.",
)

supervised = dg.define_asset_job(
    "supervised",
    selection=_recommender - _alignment,
    partitions_def=run_partitions,
    description="A `dataset | recipe` up to SFT, without preference alignment: where the paper "
    "stops on ML-1M.",
)

#: Stages' answers, the classical lists and everything before them are taken as they are.
evaluation = dg.define_asset_job(
    "evaluation",
    selection=dg.AssetSelection.groups("evaluation")
    # These two ask or fit models, and depend on no response.
    - dg.AssetSelection.assets("memorisation", "leave_last_out")
    | dg.AssetSelection.assets(*(f"{stage}_recommendations" for stage in CHECKPOINT_OF_STAGE)),
    partitions_def=run_partitions,
    description="Everything after the responses of a `dataset | recipe`, without a model: "
    "grounding, metrics, tables, report. Where a stage has not answered (ML-1M stops at SFT), "
    "leave its recommendations out of the selection, as `llmrec evaluate` does.",
)

promotion = dg.define_asset_job(
    "promotion",
    selection=dg.AssetSelection.groups("champion"),
    partitions_def=dataset_partitions,
    description="Lets a recipe challenge the champion of a data set, or brings an earlier champion "
    "back: run config names the recipe (challenger) or the version (roll_back_to).",
)
