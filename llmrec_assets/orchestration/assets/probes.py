"""Group ``evaluation``, probes: what the base model knew before it was trained on anything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from llmrec_assets.ground.store import StoredTable
from llmrec_assets.orchestration.assets.common import table_options
from llmrec_assets.orchestration.config import RunConfig
from llmrec_assets.orchestration.partitions import dataset_of, recipe_of, run_partitions
from llmrec_assets.orchestration.progress import report_progress
from llmrec_assets.orchestration.provenance import made_before
from llmrec_assets.orchestration.resources import GPU_POOL, GpuResource, StoreResource
from llmrec_assets.orchestration.results import Frame, TableResult, table_result

GROUP = "evaluation"


@dg.asset(**table_options("memorisation", GROUP), partitions_def=run_partitions, pool=GPU_POOL)
def memorisation(
    context: dg.AssetExecutionContext,
    config: RunConfig,
    storage: StoreResource,
    gpu: GpuResource,
    movielens_files: Path,
    base_model: Path,
) -> TableResult:
    """Does the base model complete MovieLens' own rows? Beside a control and a guess."""
    from llmrec_assets.ground.report import markdown_table

    recipe, store = recipe_of(context), storage.store()

    def result(frame: Frame, facts: Mapping[str, Any]) -> TableResult:
        table = dg.MetadataValue.md(markdown_table(frame.drop(columns=["checkpoint_version"])))
        shown = {"table": table, "base_model": recipe.base_model.label, **facts}
        return table_result("memorisation", frame, shown)

    def made() -> StoredTable | None:
        return None if config.force else made_before(context, store)

    if (before := made()) is not None:
        return result(before.frame, {"reused": True})
    from llmrec_assets.ground.memorisation import (
        memorisation_questions,
        memorisation_table,
        read_source_rows,
    )
    from llmrec_assets.models.memorisation import continue_rows

    rows = read_source_rows(movielens_files, dataset_of(context))
    questions = memorisation_questions(rows, recipe.probes, config.seed_of(recipe))
    with gpu.lease_for(context) as lease:
        # Another run may have made it while this one waited.
        if lease.waited_seconds and (before := made()) is not None:
            return result(before.frame, {"reused": True})
        texts, facts = continue_rows(
            base_model,
            questions,
            recipe.generation,
            device=lease.device,
            progress=report_progress(context),
        )
    frame = memorisation_table(
        questions,
        texts,
        confidence=recipe.evaluation.confidence,
        checkpoint_version=base_model.name,
    )
    return result(frame, {"reused": False, **facts, **lease.facts()})
