"""The versioned store: what an asset produces is published under a version, never overwritten.

    tables/<asset>/<partition>/<version>.parquet
    checkpoints/<asset>/<partition>/<version>/      files + manifest.json
    …/current.json                                  the version in force

What belongs here: publishing by rename, the ``current`` pointer, manifests and their verification.
What does not: what a version means (``tables.content_version``, ``checkpoint_version``), which
versions may go (``retention``), SQL views (``warehouse``), Dagster (``orchestration.io_manager``).

A crash at any moment leaves either the old or the new: data is written under a temporary name,
renamed, and only then does ``current.json`` change, by rename too. On object storage (any
``UPath``) a put is atomic by itself. Checkpoints need a local directory: trainers read paths.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from upath import UPath

from llmrec_assets.ground.disk import telling_disk_trouble
from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.ground.tables import conform, content_version, require, to_frame

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "manifest.json"
#: Where the record of how a version came about stands (``provenance``): a key of the manifest, and
#: of the metadata of a table's file. It is no part of any version.
PROVENANCE = "provenance"
CURRENT = "current.json"


@dataclass(frozen=True)
class StoredTable:
    """A table and the version it was read at. ``frame`` is not to be changed in place."""

    frame: pd.DataFrame
    version: str


def partition_path(partition: str) -> str:
    """``sample|quickstart`` → ``sample/quickstart``: one directory per partition dimension."""
    return "/".join(partition.split("|"))


def checkpoint_version(asset: str, determinants: Mapping[str, Any]) -> str:
    """16 hex digits over what determines a checkpoint: upstream versions, recipe section, code
    version, seed. Weights trained on a GPU are not bit-reproducible, so content cannot serve."""
    text = json.dumps({"asset": asset, **determinants}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Store:
    """Everything published under one root (``LLMREC_HOME``)."""

    root: UPath

    @classmethod
    def at(cls, location: str | Path | UPath) -> Store:
        path = UPath(location)
        if _is_local(path):
            path = UPath(Path(path.path).expanduser().resolve())
        return cls(path)

    @property
    def is_local(self) -> bool:
        """Whether the root is a directory of this machine rather than object storage."""
        return _is_local(self.root)

    # -- tables ---------------------------------------------------------------------------

    def publish_table(
        self,
        asset: str,
        partition: str,
        frame: pd.DataFrame | pa.Table,
        provenance: Mapping[str, Any] | None = None,
    ) -> str:
        """Publishes a table under the hash of its content and makes it current.

        Args:
            provenance: JSON values, written into the file's metadata.

        Raises:
            StoreError: the frame does not match the asset's declared schema, or the disk refuses.
        """
        if isinstance(frame, pa.Table):
            table = frame
            require(table, SCHEMAS[asset], asset)
        else:
            table = conform(frame, SCHEMAS[asset], asset)
        version = content_version(table)
        directory = self._directory("tables", asset, partition)
        if provenance is not None:
            kept = table.schema.metadata or {}
            recorded = json.dumps(provenance, ensure_ascii=False)
            table = table.replace_schema_metadata({**kept, PROVENANCE: recorded})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        with self.writing(), store_lock(self.root, "publish"):
            # Also when that version is there already: it may be damaged, and it is the newest now.
            _write_atomically(directory / f"{version}.parquet", buffer.getvalue())
            self._point(directory, version)
            self._tidy(directory)
        return version

    def read_table(self, asset: str, partition: str, version: str | None = None) -> StoredTable:
        """Reads a table, the current one unless a version is named.

        Raises:
            StoreError: it was never materialized, that version is no longer kept, or its file is
                damaged.
        """
        version = version or self.current(asset, partition, kind="tables")
        if version is None:
            raise StoreError(
                f"{asset} has not been materialized for {partition}: materialize it first "
                f"(`make run`, or {asset} in the UI)"
            )
        path = self.table_path(asset, partition, version)
        if not path.exists():
            raise StoreError(f"{asset} for {partition}: version {version} is not kept any more")
        data = path.read_bytes()
        try:
            table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"{path} is damaged ({error}): materialize {asset} again") from error
        if asset in SCHEMAS and table.schema.names != SCHEMAS[asset].names:
            raise StoreError(
                f"{asset} for {partition} was written by an older version of this project, with "
                f"other columns: materialize {asset} again"
            )
        return StoredTable(to_frame(table), version)

    def table_path(self, asset: str, partition: str, version: str) -> UPath:
        return self._directory("tables", asset, partition) / f"{version}.parquet"

    # -- checkpoints ----------------------------------------------------------------------

    def work_directory(self, asset: str, partition: str, version: str) -> Path:
        """Where a step builds what it will publish as ``version``; survives a kill."""
        path = Path(str(self.root)) / "work" / asset / partition_path(partition) / version
        with self.writing():
            path.mkdir(parents=True, exist_ok=True)
        return path

    def remove_work(self, path: Path) -> None:
        """Removes what a finished build left in its work directory."""
        shutil.rmtree(path, ignore_errors=True)

    def publish_checkpoint(
        self,
        asset: str,
        partition: str,
        version: str,
        files: Path,
        *,
        determinants: Mapping[str, Any],
        facts: Mapping[str, Any],
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        """Moves the files of ``files`` under ``version``, with a manifest, and makes it current.

        An intact version that is already published is kept and ``files`` becomes a further
        attempt, ``<version>-2``, ``<version>-3``, …

        Args:
            files: a directory inside ``work_directory``, on the same file system.
            determinants: what the version is the hash of.
            facts: what the run found out (losses, durations, library versions).
            provenance: JSON values, written into the manifest.

        Raises:
            StoreError: the disk refuses; ``files`` stays where it is.
        """
        with self.writing():
            return self._publish_files(
                self._local("checkpoints", asset, partition),
                version,
                files,
                {
                    "asset": asset,
                    "partition": partition,
                    "determinants": dict(determinants),
                    "facts": dict(facts),
                    **({} if provenance is None else {PROVENANCE: dict(provenance)}),
                },
            )

    def _publish_files(
        self, directory: Path, version: str, files: Path, told: Mapping[str, Any]
    ) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        hashes = {
            str(path.relative_to(files)): {
                "sha256": sha256_file(path),
                "bytes": path.stat().st_size,
            }
            for path in sorted(files.rglob("*"))
            if path.is_file() and path != files / MANIFEST
        }
        for path in files.rglob("*"):
            _sync(path)
        with store_lock(self.root, "publish"):
            # One more than the last, not the first free: retention may have removed earlier ones.
            last = max(map(_attempt_number, _attempts(directory, version)), default=0)
            attempt = f"{version}-{last + 1}" if last else version
            target = directory / attempt
            manifest = {
                **told,
                "version": attempt,
                "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": hashes,
            }
            _write_atomically(UPath(files / MANIFEST), _json_bytes(manifest))
            os.replace(files, target)
            _sync(directory)
            self._point(UPath(directory), attempt)
            self._tidy(UPath(directory))
        return target

    def checkpoint(self, asset: str, partition: str, version: str | None = None) -> Path:
        """The directory of a checkpoint, the current one unless a version is named, verified.

        Raises:
            StoreError: never materialized, or a file is missing or changed (named).
        """
        version = version or self.current(asset, partition, kind="checkpoints")
        if version is None:
            raise StoreError(f"{asset} has not been materialized for {partition}: do that first")
        path = self.checkpoint_path(asset, partition, version)
        verify_checkpoint(path)
        return path

    def checkpoint_path(self, asset: str, partition: str, version: str) -> Path:
        return self._local("checkpoints", asset, partition) / version

    def find_intact(self, asset: str, partition: str, version: str) -> Path | None:
        """The newest intact attempt published for ``version``, or None."""
        directory = self._local("checkpoints", asset, partition)
        for path in sorted(_attempts(directory, version), key=_attempt_number, reverse=True):
            with contextlib.suppress(StoreError):
                verify_checkpoint(path)
                return path
        return None

    def adopt(self, asset: str, partition: str, version: str) -> None:
        """Makes an already published checkpoint the current one; retention counts it as new.

        Raises:
            StoreError: it is not there.
        """
        directory = self._local("checkpoints", asset, partition)
        with self.writing(), store_lock(self.root, "publish"):
            if not (directory / version).is_dir():
                raise StoreError(f"{asset} for {partition}: there is no version {version} to adopt")
            os.utime(directory / version)
            self._point(UPath(directory), version)

    # -- both -----------------------------------------------------------------------------

    def current(self, asset: str, partition: str, kind: str) -> str | None:
        """The version in force, or None when the asset was never materialized there.

        Raises:
            StoreError: the pointer is damaged.
        """
        path = self._directory(kind, asset, partition) / CURRENT
        return _pointed(path) if path.exists() else None

    def current_tables(self) -> Iterator[tuple[str, str, UPath]]:
        """(asset, partition, file) of every current table, sorted."""
        tables = self.root / "tables"
        if not tables.exists():
            return
        for pointer in sorted(tables.glob(f"**/{CURRENT}"), key=str):
            asset, *keys = pointer.parent.relative_to(tables).parts
            file = pointer.parent / f"{_pointed(pointer)}.parquet"
            if file.exists():
                yield asset, "|".join(keys), file

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Whoever writes below the root does it in here: a disk that refuses is a ``StoreError``
        that names the path and the way out (``disk.telling_disk_trouble``)."""
        if not self.is_local:
            return contextlib.nullcontext()
        return telling_disk_trouble(Path(str(self.root)))

    def _directory(self, kind: str, asset: str, partition: str) -> UPath:
        return self.root / kind / asset / partition_path(partition)

    def _local(self, kind: str, asset: str, partition: str) -> Path:
        if not _is_local(self.root):
            raise StoreError("checkpoints need LLMREC_HOME to be a local directory")
        return Path(str(self._directory(kind, asset, partition)))

    def _point(self, directory: UPath, version: str) -> None:
        _write_atomically(directory / CURRENT, _json_bytes({"version": version}))

    def _tidy(self, directory: UPath) -> None:
        """Removes what killed publications and removals left. Only under the lock."""
        if not _is_local(directory):
            return  # object stores have life-cycle rules for this
        for path in Path(str(directory)).glob(".*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a published checkpoint.

    Raises:
        StoreError: there is none, or it is no JSON object with hashed ``files``.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(
            f"{directory.name}: {MANIFEST} is missing, so this is no published checkpoint; "
            "materialize the asset again with force"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{directory.name}: {MANIFEST} is damaged; materialize it again"
        ) from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(fact, dict) and {"bytes", "sha256"} <= fact.keys() for fact in files.values()
    ):
        raise StoreError(f"{directory.name}: {MANIFEST} is damaged; materialize it again")
    return manifest


def verify_checkpoint(directory: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        StoreError: a file is missing or differs; it is named.
    """
    for name, fact in read_manifest(directory)["files"].items():
        path = directory / name
        if not path.is_file():
            raise StoreError(
                f"{directory.name}/{name} is missing: materialize the asset again with force"
            )
        if path.stat().st_size != fact["bytes"] or sha256_file(path) != fact["sha256"]:
            raise StoreError(
                f"{directory.name}/{name} does not match its manifest (damaged or changed): "
                "materialize the asset again with force"
            )


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def store_lock(root: UPath, name: str) -> Iterator[None]:
    """One process at a time does ``name`` in this store; a dead holder's lock is free."""
    if not _is_local(root):
        yield
        return
    directory = Path(str(root))
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / f".{name}.lock"):
        yield


def _attempts(directory: Path, version: str) -> list[Path]:
    return [path for path in directory.glob(f"{version}*") if path.name.split("-")[0] == version]


def _attempt_number(path: Path) -> int:
    return int(path.name.rpartition("-")[2]) if "-" in path.name else 1


def builder_lock(store: Store, asset: str, partition: str) -> Path:
    """The lock file of whoever builds a version of this partition."""
    return Path(str(store.root)) / "work" / f".{asset}-{partition.replace('|', '-')}.lock"


def _pointed(pointer: UPath) -> str:
    """The version a pointer names."""
    try:
        return str(json.loads(pointer.read_text())["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{pointer} is damaged, so nothing says which version is in force: remove it and "
            "materialize the asset again"
        ) from error


def _is_local(path: UPath) -> bool:
    return path.protocol in ("", "file")


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode()


def _write_atomically(path: UPath, data: bytes) -> None:
    if not _is_local(path):
        path.write_bytes(data)
        return
    target = Path(str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except OSError as error:
        error.filename = str(target)  # a failed write names no file, and nobody knows `aside`
        raise
    finally:
        aside.unlink(missing_ok=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
