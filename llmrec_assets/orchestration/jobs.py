"""Jobs: one per partition shape, so that a launch needs a partition and nothing else."""

from __future__ import annotations

import dagster as dg

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

recommender = dg.define_asset_job(
    "recommender",
    selection=dg.AssetSelection.all()
    - dg.AssetSelection.groups("source")
    - dg.AssetSelection.assets("base_model"),
    partitions_def=run_partitions,
    description="A whole `dataset | recipe`: from prompts to the metric table. Needs source_data "
    "for the data set and prepare_base_model for the recipe.",
)
