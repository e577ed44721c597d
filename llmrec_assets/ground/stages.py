"""Which stages stand in the metric table: those made from the current prompts.

What belongs here: reading the current recommendation tables of a partition and saying which are
missing or stale. What does not: scoring them (``evaluation``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.store import Store, read_manifest

#: Tables that hold recommendations for the test windows, and the stages each brings.
STAGES_OF_TABLE = {
    "base_recommendations": ["base"],
    "sft_recommendations": ["sft"],
    "baseline_recommendations": ["popularity"],
}
RECOMMENDATION_TABLES = list(STAGES_OF_TABLE)


@dataclass(frozen=True)
class StageTables:
    """Recommendations of every stage that answers the current prompts, with the version of the
    table they come from; ``left_out`` names the others and why."""

    recommendations: pd.DataFrame
    left_out: list[str]


def current_stages(store: Store, partition: str, prompts_version: str) -> StageTables:
    """Reads the current recommendation tables and keeps those made from ``prompts_version``.

    Raises:
        DataError: none of them is.
    """
    kept, left_out = [], []
    for asset in RECOMMENDATION_TABLES:
        if store.current(asset, partition, kind="tables") is None:
            left_out.append(f"{asset} is missing: never materialized for {partition}")
            continue
        table = store.read_table(asset, partition)
        if table.frame.empty:
            left_out.append(f"{asset} is empty: {partition} has no test prompts it could answer")
            continue
        made_from = set(table.frame["prompts_version"])
        if made_from != {prompts_version}:
            left_out.append(
                f"{asset} is stale: it answers other prompts than the current ones "
                f"({prompts_version}); materialize it again"
            )
            continue
        kept.append(table.frame.assign(recommendations_version=table.version))
    if not kept:
        raise DataError(
            f"no recommendations for {partition} answer the current prompts: " + "; ".join(left_out)
        )
    return StageTables(pd.concat(kept, ignore_index=True), left_out)


def missing_stages(scored: pd.DataFrame) -> list[str]:
    """Stages that ``scored`` (any table with a ``stage`` column) lacks."""
    present = set(scored["stage"])
    return [s for stages in STAGES_OF_TABLE.values() for s in stages if s not in present]


def require_current(user_metrics: pd.DataFrame, prompts_version: str) -> None:
    """Refuses metrics of other prompts than the current ones.

    Raises:
        DataError: ``USER_METRICS`` rows were made from other prompts.
    """
    others = set(user_metrics["prompts_version"]) - {prompts_version}
    if others:
        raise DataError(
            f"user_metrics is stale: it scores answers to the prompts {', '.join(sorted(others))}, "
            f"the current ones are {prompts_version}; materialize user_metrics again"
        )


def require_trained_on(checkpoint: Path, *, prompts: str, base_model: str) -> None:
    """Refuses a checkpoint of other prompts or of another base model than the current ones.

    Prompts of another seed split the users anew: a checkpoint trained on them may have learnt
    from today's test users.

    Raises:
        DataError: the checkpoint's manifest names another version.
    """
    determinants = read_manifest(checkpoint)["determinants"]
    for name, version in (("prompts", prompts), ("base_model", base_model)):
        if determinants.get(name) != version:
            raise DataError(
                f"checkpoint {checkpoint.name} was trained on {name} {determinants.get(name)}, the "
                f"current version is {version}: materialize the checkpoint again first"
            )
