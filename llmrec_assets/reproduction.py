"""Making a result again from its record, and comparing.

What belongs here: a home of its own with the recorded files, recipe, seed and threads, the run in
it, and the comparison of the rows. What does not: the run itself (``runs``), the record
(``ground.provenance``).

The run is a process of its own: PyTorch takes its number of threads from the environment before
it is imported, and partitions are the recipes that are there when the graph is loaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from llmrec_assets.ground.errors import LlmrecError, StoreError
from llmrec_assets.ground.lineage import RECIPE_PARTS, Lineage, Node, part_of, trace
from llmrec_assets.ground.recommendations import LIST_KEY
from llmrec_assets.ground.schemas import METRIC_TABLE
from llmrec_assets.ground.store import Store

_ROW = ["protocol", *LIST_KEY]
_VALUES = [name for name in METRIC_TABLE.names if name not in _ROW and "_version" not in name]
_MEASURED = ("ndcg", "precision", "recall")


@dataclass(frozen=True)
class Recorded:
    """What a result was made with, as far as one run can be given it.

    ``threads``: torch's; ``None``: not recorded. ``on_gpu``: a step used one.
    """

    recipe: Mapping[str, Any]
    seed: int
    threads: int | None
    on_gpu: bool
    files: Path


def recorded(store: Store, lineage: Lineage) -> Recorded:
    """What one run must be given to make the root of ``lineage`` (a ``metric_table``) again.

    Raises:
        StoreError: it was published before there were records, or its parts were made under
            different recipes, seeds or numbers of threads, which no single run reproduces; or its
            rating files are not kept.
    """
    nodes = [*lineage.nodes.values()]
    root = nodes[0]
    if root.provenance is None or root.provenance.recipe is None:
        raise StoreError(
            f"{root.asset} {root.version} was published before there were records, so there is "
            "nothing to run again from: materialize it again"
        )
    recipe = root.provenance.recipe
    unlike = [
        f"{part} of {node.asset}"
        for node in nodes
        if node.provenance is not None and node.provenance.recipe is not None
        for part in RECIPE_PARTS.get(node.asset, ())
        if part_of(node.provenance.recipe, part) != part_of(recipe, part)
    ]
    if unlike:
        raise StoreError(
            f"the recipe was edited between its parts and {root.asset} {root.version} "
            f"({', '.join(unlike)} differ): no single run makes it again"
        )
    sources = [node for node in nodes if node.asset == "movielens_files"]
    if len(sources) != 1:
        raise StoreError(
            f"{root.asset} {root.version} rests on {len(sources)} recorded sets of rating files, "
            "expected one: no single run makes it again"
        )
    for node in nodes:
        if node.asset != "incoming_ratings":
            continue
        arrived = len(store.read_table(*node.key).frame)
        if arrived:
            raise StoreError(
                f"{root.asset} {root.version} rests on {arrived} ratings that arrived as files "
                f"({node.asset} {node.version}), which a home of its own does not have: run the "
                "recorded recipe in this home with the files that were accepted then"
            )
    made = [node.provenance for node in nodes if node.provenance is not None]
    machines = [one.machine or {} for one in made]
    seed = _one("seeds", {one.seed for one in made}, root)
    return Recorded(
        recipe=recipe,
        seed=recipe["seed"] if seed is None else seed,
        threads=_one("numbers of threads", {machine.get("threads") for machine in machines}, root),
        on_gpu=any(machine.get("gpu") for machine in machines),
        files=store.checkpoint(*sources[0].key),
    )


def _one(what: str, found: set[int | None], root: Node) -> int | None:
    told = sorted(value for value in found if value is not None)
    if len(told) > 1:
        raise StoreError(
            f"{root.asset} {root.version} rests on parts made with different {what} "
            f"({', '.join(map(str, told))}): no single run makes it again"
        )
    return told[0] if told else None


def reproduce(store: Store, dataset: str, recipe: str, version: str | None = None) -> str:
    """Makes a metric table again, from the files on, in a home of its own; says how it compares.

    A reproduction that was interrupted is resumed, one that had ended begins anew. Its home is
    removed when the rows are equal.

    Raises:
        StoreError: as ``recorded``, or the version is not kept.
        LlmrecError: the run failed, or the rows are not those recorded.
    """
    partition = f"{dataset}|{recipe}"
    lineage = trace(store, "metric_table", partition, version)
    given = recorded(store, lineage)
    expected = store.read_table(*lineage.root)
    home = Path(str(store.root)) / "reproductions" / dataset / recipe / expected.version
    if Store.at(home).current("metric_table", partition, kind="tables") is not None:
        shutil.rmtree(home)
    _write_recipe(given, expected.frame, home / "recipes" / f"{recipe}.yaml")
    command = [sys.executable, "-m", "llmrec_assets.cli", "run"]
    command += ["--dataset", dataset, "--recipe", recipe, "--seed", str(given.seed)]
    done = subprocess.run(command, env=_environment(given, dataset, home), stdout=sys.stderr)
    if done.returncode:
        raise LlmrecError(
            f"the reproduction failed (exit status {done.returncode}; its messages are above); "
            f"what it made so far is kept in {home} and resumed by the next attempt"
        )
    found = Store.at(home).read_table("metric_table", partition)
    differences = differing_rows(expected.frame, found.frame)
    if differences and not (given.on_gpu and within_intervals(expected.frame, found.frame)):
        raise LlmrecError(
            f"metric_table {expected.version} is not reproduced; both are kept, the new one in "
            f"{home}:\n" + "\n".join(differences)
        )
    shutil.rmtree(home)
    threads = "" if given.threads is None else f", {given.threads} threads"
    told = f"metric_table {expected.version}, made again (seed {given.seed}{threads}): "
    if differences:
        return (
            told + "within the recorded intervals, as is asked of a GPU:\n" + "\n".join(differences)
        )
    return told + f"all {len(expected.frame)} rows are equal, bit for bit"


def _write_recipe(given: Recorded, rows: pd.DataFrame, path: Path) -> None:
    """The recorded recipe as the file of the run; it goes past SFT where the rows do."""
    aligned = rows["stage"].isin(["dpo", "rlhf"]).any()
    values = {**given.recipe}
    if not aligned:
        values["aligned_datasets"] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")


def _environment(given: Recorded, dataset: str, home: Path) -> dict[str, str]:
    changes = {
        "LLMREC_HOME": str(home),
        "DAGSTER_HOME": str(home / "dagster_home"),
        "LLMREC_RECIPES_DIR": str(home / "recipes"),
        "LLMREC_SAMPLE_DIR" if dataset == "sample" else "LLMREC_DATA_DIR": str(given.files),
    }
    if given.threads is not None:
        changes |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(given.threads))
    if not given.on_gpu:
        changes["LLMREC_DEVICE"] = "cpu"
    return {**os.environ, **changes}


def differing_rows(expected: pd.DataFrame, found: pd.DataFrame) -> list[str]:
    """How the rows of two metric tables differ, a line each; empty: not in one bit.

    Compared are all figures; the versions they rest on are not (a second attempt at the same
    training has another name).

    Args:
        expected: ``METRIC_TABLE``.
        found: ``METRIC_TABLE``; rows that only it has are lines too.
    """
    before, after = (frame.set_index(_ROW)[_VALUES] for frame in (expected, found))
    lines = []
    for row in dict.fromkeys((*before.index, *after.index)):
        name = ", ".join(row[1:])
        if row not in before.index or row not in after.index:
            lines.append(f"{name}: only in the {'new' if row in after.index else 'recorded'} table")
            continue
        one, other = before.loc[row], after.loc[row]
        unlike = [
            f"{column} {one[column]!r} was, {other[column]!r} is"
            for column in _VALUES
            if not _same(one[column], other[column])
        ]
        if unlike:
            lines.append(f"{name}: {'; '.join(unlike)}")
    return lines


def within_intervals(expected: pd.DataFrame, found: pd.DataFrame) -> bool:
    """Whether the same rows are there and every new NDCG, Precision and Recall lies in the recorded
    interval: what is asked of a GPU, where a changed bit can turn a sampled token."""
    before, after = (frame.set_index(_ROW) for frame in (expected, found))
    if set(before.index) != set(after.index):
        return False
    after = after.loc[before.index]
    return all(
        bool(after[name].between(before[f"{name}_low"], before[f"{name}_high"]).all())
        for name in _MEASURED
    )


def _same(one: Any, other: Any) -> bool:
    return bool((pd.isna(one) and pd.isna(other)) or one == other)
