"""The SQL door: a DuckDB view per table asset over the current Parquet files.

What belongs here: views, the published ``warehouse.duckdb``, queries. What does not: storing
tables (``store``).

The file is built aside and published by rename, so an open client blocks no run; it sees the old
views until it reconnects. It is written in a storage version that released DuckDB command lines
read. ``query`` needs no file at all: it makes the same views in memory, so it answers even while
another client holds the file open for writing.
"""

from __future__ import annotations

import glob
import os
import uuid
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from llmrec_assets.ground.store import Store, store_lock

if TYPE_CHECKING:
    import duckdb

WAREHOUSE = "warehouse.duckdb"
#: Readable by DuckDB 1.5 and later (the packaged command line is older than the library).
_STORAGE_VERSION = "v1.5.0"


def view_statements(store: Store) -> list[str]:
    """``CREATE VIEW`` per table asset, with the partition as columns and absolute reads."""
    reads: dict[str, list[str]] = defaultdict(list)
    for asset, partition, file in store.current_tables():
        names = ("dataset", "recipe")
        keys = partition.split("|")
        columns = ", ".join(
            f"{_quote(key)} AS {name}" for name, key in zip(names, keys, strict=False)
        )
        # A home such as "runs*/recipe=tiny" is neither a pattern nor a partition.
        path = _quote(glob.escape(str(file)))
        reads[asset].append(
            f"SELECT {columns}, * FROM read_parquet({path}, hive_partitioning = false)"
        )
    return [
        f'CREATE VIEW "{asset}" AS ' + " UNION ALL BY NAME ".join(selects)
        for asset, selects in sorted(reads.items())
    ]


def publish_warehouse(store: Store) -> Path | None:
    """Builds ``warehouse.duckdb`` for the tables that are current now and publishes it.

    A home on object storage has no local file to publish and gives None.

    Raises:
        StoreError: the disk refuses; the file that was there stays.
    """
    import duckdb

    if not store.is_local:
        return None
    root = Path(str(store.root))
    target = root / WAREHOUSE
    with store.writing(), store_lock(store.root, "warehouse"):
        aside = root / f".{WAREHOUSE}.{uuid.uuid4().hex}"
        try:
            with duckdb.connect() as connection:
                connection.execute(
                    f"ATTACH {_quote(str(aside))} AS warehouse "
                    f"(STORAGE_VERSION {_quote(_STORAGE_VERSION)})"
                )
                connection.execute("USE warehouse")
                for statement in view_statements(store):
                    connection.execute(statement)
                connection.execute("USE memory")
                connection.execute("DETACH warehouse")
            # A writing client leaves its log beside the file it opened; replayed into the new
            # file it would damage it.
            target.with_name(WAREHOUSE + ".wal").unlink(missing_ok=True)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
            aside.with_name(aside.name + ".wal").unlink(missing_ok=True)
    return target


def connect(store: Store) -> duckdb.DuckDBPyConnection:
    """An in-memory connection with a view per table; reads current data, locks nothing."""
    import duckdb

    connection = duckdb.connect()
    for statement in view_statements(store):
        connection.execute(statement)
    return connection


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
