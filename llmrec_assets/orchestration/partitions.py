"""The two partition dimensions, and what a step's partition means.

``dataset`` for what depends on data alone, ``recipe`` for the base model, ``dataset | recipe`` for
everything after: a click, a schedule and a backfill then say completely what they mean.
"""

from __future__ import annotations

import dagster as dg

from llmrec_assets.ground.recipes import Recipe, load_recipe, recipe_names

DATASETS = ["sample", "ml-100k", "ml-1m"]

dataset_partitions = dg.StaticPartitionsDefinition(DATASETS)
recipe_partitions = dg.StaticPartitionsDefinition(recipe_names())
run_partitions = dg.MultiPartitionsDefinition(
    {"dataset": dataset_partitions, "recipe": recipe_partitions}
)


def dataset_of(context: dg.AssetExecutionContext) -> str:
    """The data set of a step partitioned by ``dataset`` or ``dataset | recipe``."""
    return context.partition_key.split("|")[0]


def recipe_of(context: dg.AssetExecutionContext) -> Recipe:
    """The recipe of a step partitioned by ``recipe`` or ``dataset | recipe``."""
    return load_recipe(context.partition_key.split("|")[-1])
