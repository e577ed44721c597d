"""Which versions a step read, and the record of what it publishes.

What belongs here: noting inputs while a step runs, and the record as metadata. What does not: the
record itself (``ground.provenance``), what is stale (``ground.lineage``).

IO managers note what they load. A body that reads the store itself notes what it used with
``note_inputs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from weakref import WeakKeyDictionary

import dagster as dg

from llmrec_assets.ground import surroundings
from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.lineage import Lineage
from llmrec_assets.ground.provenance import (
    CODE_VERSION,
    Input,
    Provenance,
    read_provenance,
)
from llmrec_assets.ground.store import Store, StoredTable
from llmrec_assets.orchestration.partitions import DATASETS, recipe_of

# By step: forgotten with it, whether it ends well or not.
_inputs: WeakKeyDictionary[dg.AssetExecutionContext, dict[str, Input]] = WeakKeyDictionary()
_kept: WeakKeyDictionary[dg.AssetExecutionContext, Provenance | None] = WeakKeyDictionary()


def note_input(asset: str, partition: str, version: str) -> None:
    """The running step reads this version. Outside a step nothing is noted."""
    try:
        step = dg.AssetExecutionContext.get()
    except dg.DagsterInvariantViolationError:
        return
    _inputs.setdefault(step, {})[asset] = Input(partition, version)


def note_inputs(context: dg.AssetExecutionContext, versions: Mapping[str, str]) -> None:
    """The running step uses these versions (by asset) of its own partition."""
    for asset, version in versions.items():
        note_input(asset, context.partition_key, version)


def keep_provenance(context: dg.AssetExecutionContext, store: Store, version: str) -> None:
    """The running step publishes again what stands in ``version`` of its asset, which another run
    made: that run's record stays."""
    asset = context.asset_key.path[-1]
    _kept[context] = read_provenance(store, asset, context.partition_key, version)


def made_before(context: dg.AssetExecutionContext, store: Store) -> StoredTable | None:
    """The current table of the running step, where another run made it from the very same: inputs,
    recipe, seed and code. None where it differs, is damaged, or was never made.

    The step then publishes it again, and its record stays.
    """
    asset, partition = context.asset_key.path[-1], context.partition_key
    try:
        table = store.read_table(asset, partition)
        made = read_provenance(store, asset, partition, table.version)
    except StoreError:
        return None
    wanted = Provenance.from_json(_record_of(context))
    if made is None or any(
        getattr(made, name) != getattr(wanted, name)
        for name in ("inputs", "recipe", "seed", "code")
    ):
        return None
    keep_provenance(context, store, table.version)
    return table


def provenance_of_step() -> dict[str, Any] | None:
    """The record of what the running step publishes now, as JSON values; ``None`` where it
    publishes again what was made before there were records."""
    step = dg.AssetExecutionContext.get()
    if step in _kept:
        kept = _kept[step]
        return None if kept is None else kept.to_json()
    return _record_of(step)


def _record_of(step: dg.AssetExecutionContext) -> dict[str, Any]:
    recipe = None if step.partition_key in DATASETS else recipe_of(step)
    seed = None
    if recipe is not None and "seed" in (config := step.op_execution_context.op_config or {}):
        seed = recipe.seed if config["seed"] is None else config["seed"]
    return Provenance(
        inputs=dict(sorted(_inputs.get(step, {}).items())),
        run_id=step.run_id,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=None if recipe is None else recipe.model_dump(mode="json"),
        seed=seed,
        code=CODE_VERSION,
        commit=surroundings.commit(),
        libraries=surroundings.library_versions(),
        machine=surroundings.machine(),
    ).to_json()


def lineage_metadata(lineage: Lineage) -> dict[str, Any]:
    """The record of ``lineage``'s root as metadata, and everything it was made from, each version
    with a link to the run that made it."""
    root, *others = lineage.nodes.values()
    made = root.provenance or Provenance({})
    shown: dict[str, Any] = {}
    if made.run_id is not None:
        shown["made_in_run"] = dg.MetadataValue.dagster_run(made.run_id)
    if made.seed is not None:
        shown["seed"] = made.seed
    if made.recipe is not None:
        shown["recipe"] = dg.MetadataValue.json(made.recipe)
    if others:
        lines = ["| made from | partition | version | run |", "|---|---|---|---|"]
        for node in others:
            run = node.provenance.run_id if node.provenance else None
            link = "not recorded" if run is None else f"[{run[:8]}](/runs/{run})"
            partition = node.partition.replace("|", "\\|")
            lines.append(f"| {node.asset} | {partition} | {node.version} | {link} |")
        shown["made_from"] = dg.MetadataValue.md("\n".join(lines))
    return shown | {"made_with": dg.MetadataValue.md(_made_with(made))}


def _made_with(made: Provenance) -> str:
    # A few lines: as JSON, or as a table, it would push everything else off the page.
    code = {"version": made.code, "commit": made.commit}
    parts = {"code": code, "machine": made.machine or {}, "libraries": made.libraries or {}}
    lines = []
    for part, facts in parts.items():
        told = [f"{name} {fact}" for name, fact in facts.items() if fact is not None]
        lines.append(f"**{part}**: {', '.join(told) or 'not recorded'}")
    return "\n\n".join(lines)
