"""Group ``evaluation``, probes: what the base model knew before it was trained on anything."""

from pathlib import Path

import dagster as dg

from llmrec_assets.ground.memorisation import (
    memorisation_questions,
    memorisation_table,
    read_source_rows,
)
from llmrec_assets.ground.report import markdown_table
from llmrec_assets.orchestration.assets.common import table_options
from llmrec_assets.orchestration.partitions import dataset_of, recipe_of, run_partitions
from llmrec_assets.orchestration.progress import report_progress
from llmrec_assets.orchestration.resources import GPU_POOL, GpuResource
from llmrec_assets.orchestration.results import TableResult, table_result

GROUP = "evaluation"


@dg.asset(**table_options("memorisation", GROUP), partitions_def=run_partitions, pool=GPU_POOL)
def memorisation(
    context: dg.AssetExecutionContext, gpu: GpuResource, movielens_files: Path, base_model: Path
) -> TableResult:
    """Does the base model complete MovieLens' own rows? Beside a control and a guess."""
    from llmrec_assets.models.memorisation import continue_rows

    recipe = recipe_of(context)
    rows = read_source_rows(movielens_files, dataset_of(context))
    questions = memorisation_questions(rows, recipe.probes, recipe.seed)
    with gpu.lease(context.log, f"memorisation {context.partition_key}") as device:
        texts, facts = continue_rows(
            base_model,
            questions,
            recipe.generation,
            device=device,
            progress=report_progress(context),
        )
    frame = memorisation_table(
        questions,
        texts,
        confidence=recipe.evaluation.confidence,
        checkpoint_version=base_model.name,
    )
    table = dg.MetadataValue.md(markdown_table(frame.drop(columns=["checkpoint_version"])))
    return table_result(
        "memorisation", frame, {"table": table, "base_model": recipe.base_model.label, **facts}
    )
