"""What the report says beside the tables: facts and curves of every stage that has been made.

What belongs here: reading manifests and the preference tables of a partition. What does not: how
the report looks (``report_page``).
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec_assets.ground.plots import curves_plot
from llmrec_assets.ground.store import Store, read_manifest

if TYPE_CHECKING:
    import pandas as pd

    from llmrec_assets.ground.report_page import Curve, Report

#: Checkpoint asset → what its curves are called.
TRAININGS = {
    "sft_checkpoint": "SFT",
    "dpo_checkpoint": "DPO",
    "reward_model": "Reward model",
    "rlhf_checkpoint": "RLHF",
}
#: What the report shows where it is there, and has no part in the metric table.
TABLES = ("memorisation", "leave_last_out")
#: Facts that are too long for a table or name users.
_HIDDEN = {"curves", "losses", "libraries", "trained_user_ids"}


@dataclass(frozen=True)
class ReportInputs:
    """``versions``, ``facts`` and ``tables`` by asset; what was never made is in none of them."""

    versions: Mapping[str, str]
    facts: Mapping[str, Mapping[str, Any]]
    tables: Mapping[str, pd.DataFrame]
    _curves: Mapping[str, Mapping[str, Any]]

    def curves(self) -> list[Curve]:
        """One picture per training, its curves as panels."""
        from llmrec_assets.ground.report_page import Curve

        return [
            Curve(TRAININGS[asset], curves_plot(curves, x="step"))
            for asset, curves in self._curves.items()
            if curves
        ]


def report_inputs(store: Store, partition: str, prompts_version: str) -> ReportInputs:
    """Reads what stands in force for ``partition`` and was made from ``prompts_version``."""
    versions: dict[str, str] = {}
    facts: dict[str, Mapping[str, Any]] = {}
    curves: dict[str, Mapping[str, Any]] = {}
    sft = store.current("sft_checkpoint", partition, kind="checkpoints")
    for asset in TRAININGS:
        version = store.current(asset, partition, kind="checkpoints")
        if version is None:
            continue
        manifest = read_manifest(store.checkpoint(asset, partition, version))
        made_from = manifest["determinants"]
        on_sft = made_from.get("sft_checkpoint", sft)
        if made_from.get("prompts") != prompts_version or on_sft != sft:
            continue  # stale: its stage is not in the metric table either
        found = manifest["facts"]
        versions[asset] = version
        facts[asset] = {"version": version} | {
            name: value for name, value in found.items() if name not in _HIDDEN
        }
        losses = found.get("losses")
        curves[asset] = found.get("curves") or ({"training loss": losses} if losses else {})
    pairs = _pair_facts(store, partition, sft)
    if pairs is not None:
        versions["preference_pairs"], facts["preference_pairs"] = pairs
        versions["sampled_responses"] = str(
            store.current("sampled_responses", partition, kind="tables")
        )
    tables: dict[str, pd.DataFrame] = {}
    base = store.current("base_model", partition.split("|")[-1], kind="checkpoints")
    for asset in TABLES:
        if store.current(asset, partition, kind="tables") is None:
            continue
        table = store.read_table(asset, partition)
        if asset == "memorisation" and set(table.frame["checkpoint_version"]) != {base}:
            continue  # another base model was asked
        versions[asset], tables[asset] = table.version, table.frame
    return ReportInputs(versions, facts, tables, curves)


def _pair_facts(
    store: Store, partition: str, sft_checkpoint: str | None
) -> tuple[str, dict[str, Any]] | None:
    """How many prompts were sampled, and how many of them gave a pair."""
    for asset in ("sampled_responses", "preference_pairs"):
        if store.current(asset, partition, kind="tables") is None:
            return None
    key = ["user_id", "window_index"]
    sampled = store.read_table("sampled_responses", partition).frame
    pairs = store.read_table("preference_pairs", partition)
    if set(pairs.frame["checkpoint_version"]) != {sft_checkpoint}:
        return None  # another policy's
    facts: dict[str, Any] = {
        "prompts_sampled": len(sampled[key].drop_duplicates()),
        "responses": len(sampled),
        "prompts_with_a_pair": len(pairs.frame[key].drop_duplicates()),
    }
    for split in ("train", "validation"):
        facts[f"{split}_pairs"] = int((pairs.frame["split"] == split).sum())
    from_truth = int((pairs.frame["origin"] == "ground truth").sum())
    facts["version"] = pairs.version
    return pairs.version, {**facts, "pairs_with_the_ground_truth": from_truth}


def write_report(report: Report, directory: Path) -> Path:
    """``report.md``, ``report.html`` and the pictures that the Markdown shows."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "report.md").write_text(report.markdown, encoding="utf-8")
    (directory / "report.html").write_text(report.html, encoding="utf-8")
    for name, data in report.files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def self_contained(store: Store, partition: str) -> str:
    """The current report's Markdown with its pictures inside, for a viewer without its files."""
    directory = store.checkpoint("report", partition)
    text = (directory / "report.md").read_text(encoding="utf-8")
    for path in sorted(directory.glob("*/*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        shown = path.relative_to(directory).as_posix()
        text = text.replace(f"]({shown})", f"](data:image/png;base64,{data})")
    return text
