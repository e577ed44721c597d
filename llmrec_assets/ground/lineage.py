"""From a published version back to the rating files, and what of it is stale today.

What belongs here: walking from record to record, and comparing what they say with what is in
force. What does not: the record (``provenance``), showing it (``lineage_page``).

Versions from before the record are walked by what they do say: the versions in a manifest's
determinants and in a table's columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmrec_assets.ground.errors import RecipeError, StoreError
from llmrec_assets.ground.provenance import CODE_VERSION, Input, Provenance, read_provenance
from llmrec_assets.ground.recipes import load_recipe
from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.ground.stages import CHECKPOINT_OF_STAGE, STAGES_OF_TABLE
from llmrec_assets.ground.store import Store, read_manifest, verify_checkpoint
from llmrec_assets.ground.tables import content_version

#: What an asset reads of the recipe: sections, or single values of one. The seed is told apart
#: (``Provenance.seed``), but for assets that take the recipe's own. A checkpoint's first section is
#: the ``recipe`` of its determinants.
RECIPE_PARTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("movielens_files", "movies", "users", "incoming_ratings", "ratings"), ()),
    # A decision of its day, not of today's recipe.
    **dict.fromkeys(("champion", "promotions"), ()),
    "user_splits": ("splits",),
    "catalogue": ("prompts.titles", "seed"),
    "interaction_windows": ("windows",),
    "prompts": ("prompts", "windows.liked_min", "windows.top_k"),
    "base_model": ("base_model",),
    "sft_checkpoint": ("sft",),
    "sampled_responses": ("sampling",),
    "preference_pairs": ("preferences", "grounding", "windows.top_k"),
    "dpo_checkpoint": ("dpo",),
    "reward_model": ("reward", "evaluation.resamples", "evaluation.confidence"),
    "rlhf_checkpoint": ("rlhf", "grounding", "windows.top_k"),
    **{
        f"{stage}_responses": (
            *("generation", "evaluation.max_test_users", "windows.top_k"),
            "baselines.ease",  # proposes where the recipe has candidates
        )
        for stage in CHECKPOINT_OF_STAGE
    },
    **{f"{stage}_recommendations": ("grounding", "windows.top_k") for stage in CHECKPOINT_OF_STAGE},
    "baseline_recommendations": ("baselines", "windows", "prompts", "evaluation.max_test_users"),
    "user_metrics": ("windows.protocol", "windows.top_k", "baselines"),
    "comparisons": ("evaluation.resamples", "evaluation.confidence", "baselines"),
    "group_metrics": ("evaluation", "windows"),
    "beyond_accuracy": ("windows", "baselines"),
    "metric_table": (
        *("evaluation.resamples", "evaluation.confidence", "windows.top_k", "baselines"),
    ),
    "sample_recommendations": ("windows.liked_min", "baselines"),
    "leave_last_out": ("leave_last_out", "evaluation.resamples", "evaluation.confidence"),
    "memorisation": ("probes", "generation", "evaluation.confidence"),
    "report": ("base_model.label", "evaluation.confidence", "baselines"),
}

#: What identifies a published version: asset, partition, version.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Node:
    """One published version. ``inputs``: what it was made of, keys into ``Lineage.nodes``.
    ``files``: sha256 by name, of a checkpoint. ``lost``: it is not kept any more, or unreadable."""

    asset: str
    partition: str
    version: str
    inputs: tuple[Key, ...] = ()
    provenance: Provenance | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    lost: str | None = None

    @property
    def key(self) -> Key:
        return self.asset, self.partition, self.version


@dataclass(frozen=True)
class Lineage:
    """A version and everything it was made of: the root first, then depth first."""

    root: Key
    nodes: Mapping[Key, Node]


def trace(
    store: Store,
    asset: str,
    partition: str,
    version: str | None = None,
    stage: str | None = None,
) -> Lineage:
    """Everything that a version was made of, the current one unless another is named.

    Args:
        stage: follows only the lists of this stage of the metric table.

    Raises:
        StoreError: it was never materialized, or that version is not kept.
    """
    version = version or store.current(asset, partition, _kind(asset))
    if version is None:
        raise StoreError(f"{asset} has not been materialized for {partition}: do that first")
    nodes: dict[Key, Node] = {}
    _visit(store, (asset, partition, version), stage, nodes)
    root = nodes[asset, partition, version]
    if root.lost is not None:
        kept = ", ".join(_kept(store, asset, partition)) or "none"
        raise StoreError(f"{root.lost}; kept versions: {kept}")
    return Lineage(root.key, nodes)


def _visit(store: Store, key: Key, stage: str | None, nodes: dict[Key, Node]) -> None:
    if key in nodes:
        return
    try:
        provenance = read_provenance(store, *key)
        inputs = _inputs_told(store, key, provenance, stage)
        files = {}
        if key[0] not in SCHEMAS:
            manifest = read_manifest(store.checkpoint_path(*key))
            files = {name: str(fact["sha256"]) for name, fact in manifest["files"].items()}
    except StoreError as error:
        nodes[key] = Node(*key, lost=str(error))
        return
    wanted = tuple(
        (name, given.partition, given.version)
        for name, given in inputs.items()
        if stage is None or stage in STAGES_OF_TABLE.get(name, [stage])
    )
    nodes[key] = Node(*key, inputs=wanted, provenance=provenance, files=files)
    for other in wanted:
        _visit(store, other, stage, nodes)


def _inputs_told(
    store: Store, key: Key, provenance: Provenance | None, stage: str | None
) -> dict[str, Input]:
    """What the version was made of, by asset: as recorded at publishing, else as far as its
    determinants or its columns tell."""
    asset, partition, _ = key
    if asset not in SCHEMAS:
        told = read_manifest(store.checkpoint_path(*key))["determinants"]
        versions = {name: told[name] for name in RECIPE_PARTS if isinstance(told.get(name), str)}
        recorded = provenance.inputs if provenance else {}
        return {**_placed(versions, partition), **recorded}
    if provenance is not None:
        return dict(provenance.inputs)
    return _placed(dict(_versions_in_columns(store, key, stage)), partition)


def _placed(versions: Mapping[str, str], partition: str) -> dict[str, Input]:
    """Inputs of a ``dataset | recipe``, each in the partition its asset has."""
    dataset, _, recipe = partition.partition("|")
    of_source = {asset for asset, parts in RECIPE_PARTS.items() if not parts}
    return {
        asset: Input(
            recipe if asset == "base_model" else dataset if asset in of_source else partition,
            version,
        )
        for asset, version in versions.items()
    }


def _versions_in_columns(store: Store, key: Key, stage: str | None) -> Iterator[tuple[str, str]]:
    """(asset, version) of every input that the rows name."""
    asset = key[0]
    table = _read(store, key)
    names = [n for n in table.schema.names if n == "stage" or n.endswith("_version")]
    rows = table.select(names).to_pandas().drop_duplicates().to_dict("records")
    table_of = {s: name for name, stages in STAGES_OF_TABLE.items() for s in stages}
    of_policy = "base_model" if asset == "memorisation" else "sft_checkpoint"
    for row in rows:
        own = row.get("stage")
        if stage is not None and own not in (None, stage):
            continue
        for column, name in (
            ("prompts_version", "prompts"),
            ("user_metrics_version", "user_metrics"),
            ("recommendations_version", table_of.get(own)),
            ("checkpoint_version", of_policy if own is None else CHECKPOINT_OF_STAGE.get(own)),
        ):
            if name is not None and isinstance(row.get(column), str):
                yield name, row[column]


def stale(store: Store, lineage: Lineage) -> dict[Key, list[str]]:
    """What no longer holds, by version; a version that holds is not in it.

    Held against: every version is the one in force; its content matches its version or manifest;
    the code version is today's; the parts of the recipe that it read are as in the file today, the
    seed too, unless a run had overridden it. What is not recorded is not judged.
    """
    found = {}
    for node in lineage.nodes.values():
        problems = [node.lost] if node.lost else [*_problems(store, node)]
        if problems:
            found[node.key] = problems
    return found


def _problems(store: Store, node: Node) -> Iterator[str]:
    in_force = store.current(node.asset, node.partition, _kind(node.asset))
    if in_force != node.version:
        yield f"replaced: the version in force is {in_force or 'none'}"
    damage = _damage(store, node)
    if damage is not None:
        yield damage
    made = node.provenance
    if made is None:
        return
    if made.code is not None and made.code != CODE_VERSION:
        yield f"made by code version {made.code}, today's is {CODE_VERSION}"
    yield from _recipe_changes(store, node, made)


def _damage(store: Store, node: Node) -> str | None:
    try:
        if node.asset not in SCHEMAS:
            verify_checkpoint(store.checkpoint_path(*node.key))
        elif content_version(_read(store, node.key)) != node.version:
            return f"its file's content is not that of version {node.version} (damaged or changed)"
    except StoreError as error:
        return str(error)
    return None


def _recipe_changes(store: Store, node: Node, made: Provenance) -> Iterator[str]:
    """Parts of the recipe that the version read and that the file says otherwise today."""
    parts = RECIPE_PARTS.get(node.asset, ())
    if not parts:
        return
    name = node.partition.split("|")[-1]
    try:
        recipe = load_recipe(name).model_dump(mode="json")
    except RecipeError as error:
        yield f"its recipe cannot be read any more: {error}"
        return
    if made.recipe is not None:
        for part in parts:
            yield from _changes(part, part_of(made.recipe, part), part_of(recipe, part))
        overridden = made.seed != made.recipe["seed"]
    else:
        # Before the record: a checkpoint's determinants hold its own section, and its seed.
        told = {}
        with contextlib.suppress(StoreError):
            told = read_manifest(store.checkpoint_path(*node.key))["determinants"]
        if "recipe" in told:
            yield from _changes(parts[0], told["recipe"], recipe[parts[0]])
        overridden = True  # or not: the manifest does not say
    if made.seed is not None and not overridden and made.seed != recipe["seed"]:
        yield f"recipe edited: seed {made.seed}, now {recipe['seed']}"


def part_of(recipe: Mapping[str, Any], part: str) -> Any:
    """A section of a dumped recipe, or a value of one (``windows.top_k``); ``None``: not there."""
    value: Any = recipe
    for name in part.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _changes(name: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*before, *now)):
            yield from _changes(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield f"recipe edited: {name} {before}, now {now}"


def _read(store: Store, key: Key) -> pa.Table:
    """A table's file as it is, whatever schema it was written with."""
    path = store.table_path(*key)
    try:
        with path.open("rb") as file:
            return pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path.name} of {key[0]} is damaged ({error})") from error


def _kept(store: Store, asset: str, partition: str) -> Sequence[str]:
    directory = (
        store.table_path(asset, partition, "any").parent
        if asset in SCHEMAS
        else store.checkpoint_path(asset, partition, "any").parent
    )
    return sorted(
        path.name.removesuffix(".parquet")
        for path in directory.glob("*")
        if path.name[0] != "." and path.name != "current.json"
    )


def _kind(asset: str) -> str:
    return "tables" if asset in SCHEMAS else "checkpoints"
