"""Which stages stand in the metric table: those made from the current prompts.

What belongs here: reading the current recommendation tables of a partition and saying which are
missing or stale. What does not: scoring them (``evaluation``).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.store import Store

#: Tables that hold recommendations for the test windows.
RECOMMENDATION_TABLES = [
    "base_recommendations",
    "sft_recommendations",
    "baseline_recommendations",
]


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
