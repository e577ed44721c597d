"""A lineage as text for a terminal and as JSON.

What belongs here: how the tree, what made it and what is stale are written down. What does not:
finding it out (``lineage``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.lineage import Key, Lineage, Node
from llmrec_assets.ground.provenance import Provenance
from llmrec_assets.ground.surroundings import library_versions

_UNKNOWN = "not recorded"
_Stale = Mapping[Key, Sequence[str]]


def chosen_rows(
    metric_table: pd.DataFrame, stage: str | None = None, decoding: str | None = None
) -> pd.DataFrame:
    """The rows of ``METRIC_TABLE`` that are asked about.

    Raises:
        DataError: there is none; names those there are.
    """
    rows = metric_table
    for column, wanted in (("stage", stage), ("decoding", decoding)):
        rows = rows if wanted is None else rows[rows[column] == wanted]
    if rows.empty:
        there = metric_table[["stage", "decoding"]].drop_duplicates().itertuples(index=False)
        told = ", ".join(f"{row.stage} {row.decoding}" for row in there)
        raise DataError(f"metric_table has no row {stage or ''} {decoding or ''}; it has: {told}")
    return rows


def lineage_text(lineage: Lineage, stale: _Stale, rows: pd.DataFrame) -> str:
    """The tree, what made it, and what is stale.

    Args:
        rows: rows of ``METRIC_TABLE`` to show above.
    """
    root = lineage.nodes[lineage.root]
    labels = _labels(lineage)
    lines = [f"{root.partition.replace('|', ' | ')}: {root.asset} {root.version}"]
    for row in rows.to_dict("records"):
        lines.append(
            f"  {row['stage']}, {row['decoding']}, {row['information_set']}: NDCG@{row['k']} "
            f"{row['ndcg']:.4f} [{row['ndcg_low']:.4f}, {row['ndcg_high']:.4f}], "
            f"{row['hits']} hits, {row['n_users']} users"
        )
    lines += ["", *_tree(lineage, stale, lineage.root, labels, set())]
    lines += ["", "made with"]
    lines += [f"  [{label}] {told}" for told, label in labels.items()] or [f"  {_UNKNOWN}"]
    lines.append(f"  runs: {', '.join(_runs(lineage)) or _UNKNOWN}")
    lines.append(f"  libraries that differ here and now: {_differing_libraries(lineage)}")
    lines += ["", *_stale_lines(stale)]
    return "\n".join(lines)


def _labels(lineage: Lineage) -> dict[str, str]:
    """A number for every distinct code, machine and libraries: most versions share them."""
    told = (_surroundings(n.provenance) for n in lineage.nodes.values() if n.provenance)
    return {text: str(number) for number, text in enumerate(dict.fromkeys(told), start=1)}


def _surroundings(made: Provenance) -> str:
    machine = made.machine or {}
    libraries = ", ".join(f"{name} {version}" for name, version in (made.libraries or {}).items())
    cpu = machine.get("cpu")
    return "; ".join(
        (
            f"code {made.code or _UNKNOWN}, commit {made.commit or _UNKNOWN}",
            f"CPU {_UNKNOWN}" if cpu is None else f"{cpu}, {machine.get('cores')} cores",
            f"GPU {machine.get('gpu') or 'none'}" if "gpu" in machine else f"GPU {_UNKNOWN}",
            libraries or f"libraries {_UNKNOWN}",
        )
    )


def _tree(
    lineage: Lineage,
    stale: _Stale,
    key: Key,
    labels: Mapping[str, str],
    seen: set[Key],
    indent: str = "",
) -> Iterator[str]:
    node = lineage.nodes[key]
    marked = " — STALE" if key in stale else ""
    if key in seen:
        yield f"{node.asset} {node.version} (above){marked}"
        return
    seen.add(key)
    yield f"{node.asset} {node.version}  {_facts(node, labels)}{marked}"
    if node.asset == "movielens_files":
        for name, digest in node.files.items():
            yield f"{indent}   {name} sha256 {digest}"
    if not node.inputs and node.provenance is None and node.lost is None:
        yield f"{indent}└─ made from: {_UNKNOWN}"
    for branch in node.inputs:
        last = branch == node.inputs[-1]
        drawn = _tree(lineage, stale, branch, labels, seen, indent + ("   " if last else "│  "))
        yield f"{indent}{'└─' if last else '├─'} {next(drawn)}"
        yield from drawn


def _facts(node: Node, labels: Mapping[str, str]) -> str:
    told = node.provenance
    if told is None:
        return node.lost or f"run, code and machine {_UNKNOWN}"
    facts = [f"[{labels[_surroundings(told)]}] run {told.run_id[:8] if told.run_id else _UNKNOWN}"]
    facts += [f"{told.made_at[:16]}Z"] if told.made_at else []
    facts += [f"seed {told.seed}"] if told.seed is not None else []
    threads = (told.machine or {}).get("threads")
    facts += [f"threads {threads}"] if threads else []
    return ", ".join(facts)


def _runs(lineage: Lineage) -> list[str]:
    made = (node.provenance for node in lineage.nodes.values() if node.provenance)
    return [*dict.fromkeys(one.run_id for one in made if one.run_id)]


def _differing_libraries(lineage: Lineage) -> str:
    here = library_versions()
    differing = {
        f"{name} {version} (here {here.get(name, 'missing')})"
        for node in lineage.nodes.values()
        if node.provenance is not None
        for name, version in (node.provenance.libraries or {}).items()
        if here.get(name) != version
    }
    return ", ".join(sorted(differing)) or "none"


def _stale_lines(stale: _Stale) -> Iterator[str]:
    if not stale:
        yield "nothing of it is stale"
        return
    yield "stale"
    for (asset, _, version), problems in stale.items():
        for problem in problems:
            yield f"  {asset} {version}: {problem}"


def lineage_json(lineage: Lineage, stale: _Stale, rows: pd.DataFrame) -> str:
    """The same as JSON, with everything that is recorded, the recipe's values too."""
    nodes = [
        {
            "asset": node.asset,
            "partition": node.partition,
            "version": node.version,
            **(node.provenance or Provenance({})).to_json(),
            "inputs": ["/".join(key) for key in node.inputs],
            "files": dict(node.files),
            "stale": [*stale.get(node.key, [])],
        }
        for node in lineage.nodes.values()
    ]
    shown = rows.astype(object).where(rows.notna(), None).to_dict("records")
    return json.dumps({"rows": shown, "nodes": nodes}, indent=2, ensure_ascii=False)
