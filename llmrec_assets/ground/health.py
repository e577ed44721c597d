"""Looks over everything under ``LLMREC_HOME``, and mends what is safe to mend.

What belongs here: tables, checkpoints, views, leftovers, incoming files, room on the disk. What
does not: Dagster's runs, pool slots and ticks (``orchestration.upkeep``), old versions
(``retention``).

Safe to mend is what can be made again from what is published, or what nobody will miss: views,
temporary files of killed publications, work whose result is published. A damaged table or
checkpoint is named with the way to make it again, and left.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.formats import FORMATS
from llmrec_assets.ground.incoming_files import quarantined_files
from llmrec_assets.ground.retention import Version, published, remove_work, unfinished
from llmrec_assets.ground.stages import CHAMPION, CHAMPION_RECORD
from llmrec_assets.ground.store import CURRENT, Store, store_lock, verify_checkpoint
from llmrec_assets.ground.tables import content_version
from llmrec_assets.ground.warehouse import WAREHOUSE, publish_warehouse, view_statements

#: A publication takes seconds: a temporary file that is older was left by a kill.
_LITTER_AGE_S = 3600
_LOW_SPACE = 2**30

State = Literal["ok", "note", "problem", "mended"]


@dataclass(frozen=True)
class Finding:
    """One line of the examination: what was looked at, how it is, and the way out."""

    check: str
    state: State
    what: str
    remedy: str = ""


def examine(store: Store, repair: bool = False) -> list[Finding]:
    """Looks at everything; with ``repair`` mends what is safe to mend.

    Raises:
        StoreError: the home is on object storage.
    """
    if not store.is_local:
        raise StoreError("health looks at local directories: LLMREC_HOME is on object storage")
    root = Path(str(store.root))
    if not root.is_dir():
        return [Finding("home", "note", f"{root} does not exist yet: nothing has been run")]
    versions = published(store)
    return [
        *_pointers(root),
        *_tables([v for v in versions if v.kind == "tables"]),
        *_checkpoints([v for v in versions if v.kind == "checkpoints"]),
        *_views(store, root, repair),
        *_litter(store, root, repair),
        *_work(store, repair),
        *_incoming(root),
        *_space(root),
    ]


def _summary(check: str, found: Iterable[Finding], ok: str) -> list[Finding]:
    """The findings, or one line that says all is well."""
    return list(found) or [Finding(check, "ok", ok)]


def _pointers(root: Path) -> list[Finding]:
    pointers = sorted((*root.glob(f"tables/**/{CURRENT}"), *root.glob(f"checkpoints/**/{CURRENT}")))

    def look() -> Iterator[Finding]:
        for path in pointers:
            where = path.parent.relative_to(root)
            asset = where.parts[1]
            try:
                version = str(json.loads(path.read_text())["version"])
            except (OSError, ValueError, KeyError, TypeError):
                remedy = _remedy(asset)
                if asset != CHAMPION_RECORD:
                    remedy = f"remove {where}/{CURRENT} and {remedy}"
                yield Finding("pointers", "problem", f"{where}/{CURRENT} is damaged", remedy)
                continue
            name = f"{version}.parquet" if where.parts[0] == "tables" else version
            if not (path.parent / name).exists():
                what = f"{where}: the version in force, {version}, is gone"
                yield Finding("pointers", "problem", what, _remedy(asset))

    return _summary("pointers", look(), f"{len(pointers)} name a version that is there")


def _tables(versions: Sequence[Version]) -> list[Finding]:
    def look() -> Iterator[Finding]:
        for version in versions:
            problem = _table_problem(version)
            if problem is not None:
                yield _damaged("tables", version, problem)

    return _summary("tables", look(), f"{len(versions)} versions hold what their names say")


def _table_problem(version: Version) -> str | None:
    try:
        found = content_version(pq.read_table(version.path))
    except (pa.ArrowException, OSError) as error:
        return f"cannot be read ({' '.join(str(error).split())[:120]})"
    return None if found == version.name else f"has the content of {found}"


def _checkpoints(versions: Sequence[Version]) -> list[Finding]:
    def look() -> Iterator[Finding]:
        for version in versions:
            try:
                verify_checkpoint(version.path)
            except (StoreError, OSError, KeyError, TypeError) as error:
                yield _damaged("checkpoints", version, str(error).split(":")[0])

    return _summary("checkpoints", look(), f"{len(versions)} versions match their manifests")


def _damaged(check: str, version: Version, problem: str) -> Finding:
    what = f"{version.asset} {version.partition} {version.name}: {problem}"
    if version.is_current:
        return Finding(check, "problem", what, _remedy(version.asset))
    return Finding(check, "problem", f"{what} (not in force)", f"remove {version.path}")


def _remedy(asset: str) -> str:
    if asset == CHAMPION_RECORD:
        return f"it cannot be made again: name an older version that lies there in its {CURRENT}"
    if asset == CHAMPION:
        return "`llmrec promote --force` with a recipe"
    return f"materialize {asset} again"


def _views(store: Store, root: Path, repair: bool) -> list[Finding]:
    import duckdb

    path = root / WAREHOUSE
    try:
        expected = _read_files("\n".join(view_statements(store)))
    except StoreError:
        return []  # a damaged pointer, which has been named
    if not expected and not path.exists():
        return [Finding("views", "ok", "no tables yet")]
    problem = None
    try:
        with duckdb.connect(str(path), read_only=True) as connection:
            views = connection.sql("SELECT sql FROM duckdb_views() WHERE NOT internal").fetchall()
        if _read_files("\n".join(sql for (sql,) in views)) != expected:
            problem = "does not show the tables in force"
    except duckdb.Error as error:
        problem = f"cannot be opened ({' '.join(str(error).split())[:120]})"
    if problem is None:
        return [Finding("views", "ok", f"{WAREHOUSE} shows the {len(views)} tables in force")]
    if not repair:
        remedy = "`llmrec health --repair` builds it again"
        return [Finding("views", "problem", f"{WAREHOUSE} {problem}", remedy)]
    publish_warehouse(store)
    return [Finding("views", "mended", f"{WAREHOUSE} {problem}: built again")]


def _read_files(sql: str) -> set[str]:
    return set(re.findall(r"[^'/]+/[^'/]+/[0-9a-f]{16}\.parquet", sql))


def _litter(store: Store, root: Path, repair: bool) -> list[Finding]:
    places = [*root.glob("tables/**/.*"), *root.glob("checkpoints/**/.*")]
    places += root.glob(f".{WAREHOUSE}.*")
    old = [path for path in places if time.time() - path.lstat().st_mtime > _LITTER_AGE_S]

    def look() -> Iterator[Finding]:
        for path in sorted(old):
            what = f"{path.relative_to(root)} was left by a kill"
            if repair:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
                yield Finding("leftovers", "mended", f"{what}: removed")
            else:
                yield Finding("leftovers", "problem", what, "`llmrec health --repair` removes it")

    with store_lock(store.root, "publish") if repair else contextlib.nullcontext():
        return _summary("leftovers", look(), "no temporary files of killed publications")


def _work(store: Store, repair: bool) -> list[Finding]:
    def look() -> Iterator[Finding]:
        for work in unfinished(store):
            what = f"{work.asset} {work.partition} {work.name}, {work.size / 1e6:,.1f} MB"
            if work.is_published and repair and remove_work(store, work):
                yield Finding("work", "mended", f"{what}: its version is published: removed")
            elif work.is_published:
                what += ": its version is published (or a forced attempt is going on)"
                yield Finding("work", "note", what, "`llmrec health --repair` removes it when idle")
            elif work.is_stale:
                remedy = "materialize it to go on, or `llmrec prune` removes it"
                yield Finding("work", "note", f"{what}: unfinished, left long ago", remedy)
            else:
                remedy = f"materialize {work.asset} to go on"
                yield Finding("work", "note", f"{what}: unfinished, or going on", remedy)

    return _summary("work", look(), "nothing is unfinished")


def _incoming(root: Path) -> list[Finding]:
    def look() -> Iterator[Finding]:
        for dataset in FORMATS:
            for name, reason in quarantined_files(root / "incoming" / dataset).items():
                first, *_ = reason.split("\n")
                what = f"incoming/{dataset}/quarantine/{name}: {first}"
                yield Finding("incoming", "note", what, f"then move it to incoming/{dataset}")

    return _summary("incoming", look(), "no rating file is in quarantine")


def _space(root: Path) -> list[Finding]:
    free = shutil.disk_usage(root).free
    what = f"{free / 1e9:,.1f} GB free on the disk of {root}"
    if free >= _LOW_SPACE:
        return [Finding("disk", "ok", what)]
    return [Finding("disk", "problem", what, "`llmrec prune` lists old versions that may go")]
