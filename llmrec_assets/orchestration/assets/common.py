"""What every asset definition shares: owners, kinds, groups and code versions."""

from __future__ import annotations

import datetime as dt
from typing import Any

import dagster as dg

from llmrec_assets.ground.provenance import CODE_VERSION
from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.orchestration.results import table_columns

OWNERS = ["team:llmrec"]


#: Dagster looks at the newest materialization of any partition: these say that ratings have stopped
#: arriving, and that nobody has looked at figures for long, not that a partition is out of date.
RATINGS_FRESH = dg.FreshnessPolicy.time_window(
    fail_window=dt.timedelta(days=15), warn_window=dt.timedelta(days=8)
)
FIGURES_FRESH = dg.FreshnessPolicy.time_window(
    fail_window=dt.timedelta(days=31), warn_window=dt.timedelta(days=15)
)


def table_options(asset: str, group: str) -> dict[str, Any]:
    """Definition options of a table asset."""
    if asset not in SCHEMAS:
        raise KeyError(f"{asset} has no declared schema")
    return {
        "name": asset,
        "group_name": group,
        "owners": OWNERS,
        "kinds": {"python", "parquet", "duckdb"},
        "io_manager_key": "table_io",
        "code_version": CODE_VERSION,
        "metadata": {"dagster/column_schema": table_columns(asset)},
    }


def directory_options(asset: str, group: str, *kinds: str) -> dict[str, Any]:
    """Definition options of a directory asset."""
    return {
        "name": asset,
        "group_name": group,
        "owners": OWNERS,
        "kinds": set(kinds),
        "io_manager_key": "directory_io",
        "code_version": CODE_VERSION,
    }
