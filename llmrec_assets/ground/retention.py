"""What may go: versions that nothing kept cites, and work that nobody will take up again.

What belongs here: choosing and removing. What does not: publishing (``store``), which never
removes a version by itself: a reader of an older result would lose it unasked.

Kept are, of every asset and partition, the version in force and the newest ``keep``; and whatever a
kept version cites, and what that cites in turn: every version named in a checkpoint's manifest
(what it was trained from, what a champion replaced), in a ``*_version`` column or the file metadata
of a table, or in `<version>.json` beside a version.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.store import CURRENT, MANIFEST, Store, builder_lock, store_lock

#: The version in force, and the one before it, which a run may still be reading.
FEWEST = 2
#: A training's work that nobody has touched for this long was of data or values that are gone.
STALE_WORK_DAYS = 14

_VERSION = re.compile(r"(?<![0-9a-f])[0-9a-f]{16}(?:-[0-9]+)?(?![0-9a-f])")


@dataclass(frozen=True)
class Version:
    """One published version of an asset's partition. ``kind`` is "tables" or "checkpoints";
    ``modified`` is in Unix seconds: when it was published, or last made current."""

    kind: str
    asset: str
    partition: str
    name: str
    path: Path
    modified: float
    is_current: bool

    @property
    def files(self) -> list[Path]:
        """The file or directory, and the JSON file under its name beside it where there is one."""
        beside = self.path.with_name(f"{self.name}.json")
        return [self.path, *([beside] if beside.is_file() else [])]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(_size(path) for path in self.files)


@dataclass(frozen=True)
class Work:
    """A directory in which a version was being built; ``touched`` is in Unix seconds."""

    asset: str
    partition: str
    name: str
    path: Path
    touched: float
    is_published: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return _size(self.path)

    @property
    def is_stale(self) -> bool:
        """Nobody will take it up: its version is published, or it was left long ago."""
        return self.is_published or time.time() - self.touched > STALE_WORK_DAYS * 86_400


@dataclass(frozen=True)
class Plan:
    """What ``prune`` would remove, oldest first, and how many versions stay for which reason."""

    versions: list[Version]
    work: list[Work]
    kept: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(v.size for v in self.versions) + sum(work.size for work in self.work)

    def lines(self) -> list[str]:
        """For a person, one line an entry."""
        shown = [
            _line(v.kind.removesuffix("s"), v.asset, v.partition, v.name, v.modified, v.size)
            for v in self.versions
        ]
        shown += [
            _line("work", work.asset, work.partition, work.name, work.touched, work.size)
            for work in self.work
        ]
        kept = ", ".join(f"{count} {reason}" for reason, count in self.kept.items())
        return [*shown, f"{_mb(self.size)} to remove; kept: {kept or 'nothing'}"]


def plan(store: Store, keep: int) -> Plan:
    """What can go when the newest ``keep`` versions of everything stay.

    Raises:
        StoreError: ``keep`` is less than ``FEWEST``, or the home is on object storage.
    """
    if not store.is_local:
        raise StoreError("retention looks at local directories: LLMREC_HOME is on object storage")
    if keep < FEWEST:
        raise StoreError(
            f"keep is {keep}, expected at least {FEWEST}: the version in force, and the one before "
            "it, which a run may still be reading"
        )
    versions = published(store)
    by_place = defaultdict(list)
    for version in versions:
        by_place[version.kind, version.asset, version.partition].append(version)
    kept: dict[Path, str] = {}
    newest = f"of the newest {keep}"
    for found in by_place.values():
        found.sort(key=lambda version: version.modified, reverse=True)
        kept |= {version.path: newest for version in found[:keep]}
        kept |= {version.path: "in force" for version in found if version.is_current}
    by_name = defaultdict(list)
    for version in versions:
        by_name[version.name].append(version)
    reached = [version for version in versions if version.path in kept]
    while reached:
        for name in cited(reached.pop()):
            for version in by_name[name]:
                if version.path not in kept:
                    kept[version.path] = "cited"
                    reached.append(version)
    reasons = list(kept.values())
    counts = {why: reasons.count(why) for why in ("in force", newest, "cited") if why in reasons}
    return Plan(
        sorted((v for v in versions if v.path not in kept), key=lambda v: v.modified),
        [work for work in unfinished(store) if work.is_stale],
        counts,
    )


def prune(store: Store, keep: int) -> Plan:
    """Removes what ``plan`` names and returns it. A kill leaves a version whole or gone."""
    with store_lock(store.root, "publish"):
        found = plan(store, keep)
        for version in found.versions:
            # The pointer's directory lists whole versions only: first out of sight, then away.
            aside = version.path.with_name(f".removed-{uuid.uuid4().hex}")
            others = version.files[1:]
            version.path.rename(aside)
            for path in (aside, *others):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    removed = [work for work in found.work if remove_work(store, work)]
    return Plan(found.versions, removed, found.kept)


def published(store: Store) -> list[Version]:
    """Every published version of every asset and partition, whole or damaged."""
    return [*_versions(store, "tables"), *_versions(store, "checkpoints")]


def unfinished(store: Store) -> list[Work]:
    """Every work directory."""
    root = Path(str(store.root)) / "work"
    names = {(v.asset, v.partition, v.name.split("-")[0]) for v in _versions(store, "checkpoints")}
    found = []
    for path in sorted(root.glob("**/*")):
        if not path.is_dir() or not _VERSION.fullmatch(path.name):
            continue
        asset, *keys = path.parent.relative_to(root).parts
        partition = "|".join(keys)
        touched = max((told.st_mtime for told in _stats(path)), default=time.time())
        is_published = (asset, partition, path.name) in names
        found.append(Work(asset, partition, path.name, path, touched, is_published))
    return found


def remove_work(store: Store, work: Work) -> bool:
    """Removes it unless somebody is working in it; whether it went."""
    lock = FileLock(builder_lock(store, work.asset, work.partition))
    try:
        with lock.acquire(timeout=0):
            store.remove_work(work.path)
    except Timeout:
        return False
    return True


def cited(version: Version) -> set[str]:
    """Names of versions that this one mentions; nothing where it is damaged."""
    texts = [_text(path) for path in version.files if path.suffix == ".json"]
    if version.kind == "checkpoints":
        texts.append(_text(version.path / MANIFEST))
    else:
        texts += _cited_in_table(version.path)
    return {name for text in texts for name in _VERSION.findall(text)}


def _cited_in_table(path: Path) -> Iterator[str]:
    try:
        schema = pq.read_schema(path)
        columns = [
            field.name
            for field in schema
            if field.name.endswith("_version") and pa.types.is_string(field.type)
        ]
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError):
        return
    for value in (schema.metadata or {}).values():
        yield value.decode("utf-8", "replace")
    for name in columns:
        for value in pc.unique(table.column(name)).to_pylist():
            yield value or ""


def _versions(store: Store, kind: str) -> Iterator[Version]:
    root = Path(str(store.root)) / kind
    # A place is where a pointer lies, or, after a kill between the two renames, a version alone.
    places = {path.parent for path in root.glob(f"**/{CURRENT}")}
    if kind == "tables":
        places |= {path.parent for path in root.glob("**/[!.]*.parquet")}
    else:
        places |= {path.parent.parent for path in root.glob(f"**/[!.]*/{MANIFEST}")}
        # A version may hold directories, and a manifest of its own in one of them.
        places = {place for place in places if not (place / MANIFEST).exists()}
    for place in sorted(places - {root}):
        asset, *keys = place.relative_to(root).parts
        partition = "|".join(keys)
        try:
            current = store.current(asset, partition, kind)
        except StoreError:  # a damaged pointer: `llmrec health` names it
            current = None
        for path in sorted(place.glob("[!.]*")):
            name = path.name.removesuffix(".parquet") if kind == "tables" else path.name
            if kind == "tables" and path.suffix != ".parquet":
                continue
            if kind == "checkpoints" and not path.is_dir():
                continue
            if not _VERSION.fullmatch(name):
                continue  # somebody's copy, no version of ours
            modified = path.stat().st_mtime
            yield Version(kind, asset, partition, name, path, modified, name == current)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _size(path: Path) -> int:
    return sum(told.st_size for told in _stats(path) if stat.S_ISREG(told.st_mode))


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Of the path and all that lies in it. What a running training has just removed is left out."""
    for one in (path, *path.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            yield one.stat()


def _line(kind: str, asset: str, partition: str, name: str, when: float, size: int) -> str:
    days = (time.time() - when) / 86_400
    age = f"{days:.0f} days old" if days >= 1 else "of today"
    return f"{kind:<10}  {asset} {partition} {name}  {age}  {_mb(size)}"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
