"""A full, read-only or forbidden disk: said in words, nothing published is lost, and it goes on."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from llmrec_assets.ground.disk import disk_trouble, telling_disk_trouble
from llmrec_assets.ground.errors import DataError, StoreError
from llmrec_assets.ground.store import Store, sha256_file
from llmrec_assets.ground.warehouse import WAREHOUSE, publish_warehouse

TABLE, MODEL, PARTITION = "user_splits", "sft_checkpoint", "sample|tiny"
HOME = Path("/srv/llmrec")


# -- in words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/srv/llmrec/a"), "/srv/llmrec/a cannot"),
        (OSError(errno.ENOSPC, "No space left on device"), "/srv/llmrec cannot be written: there"),
        (OSError(errno.EROFS, "Read-only file system", "/srv/llmrec/a"), "is mounted read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/srv/llmrec/a"), "permissions forbid"),
        (OSError(errno.EFBIG, "File too large", "/srv/llmrec/a"), "Raise `ulimit -f`"),
        (duckdb.IOException("Could not write file: No space left on device"), "no room left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no room left"),
    ],
)
def test_a_disk_that_refuses_is_told_with_the_path_and_the_way_out(
    error: Exception, said: str
) -> None:
    told = disk_trouble(error, HOME)
    assert told is not None and said in told
    assert "What is published is whole" in told and "it goes on where it stopped" in told
    with pytest.raises(StoreError, match="cannot be written"), telling_disk_trouble(HOME):
        raise ValueError("saving failed") from error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOENT, "No such file or directory", "/srv/llmrec/a"),
        PermissionError(errno.EACCES, "Permission denied", "/somebody/elses/model"),
        RuntimeError("the size of tensor a must match"),
        ConnectionError("refused"),
        RuntimeError("the hub says: Permission denied"),
    ],
)
def test_other_errors_keep_their_own_words(error: Exception) -> None:
    assert disk_trouble(error, HOME) is None
    with pytest.raises(type(error)), telling_disk_trouble(HOME):
        raise error


def test_an_error_that_is_told_already_is_not_told_again() -> None:
    with pytest.raises(DataError, match="row 3"), telling_disk_trouble(HOME):
        raise DataError("row 3") from OSError(errno.ENOSPC, "No space left on device")


def test_sqlite_means_dagsters_history() -> None:
    full = RuntimeError("(sqlite3.OperationalError) database or disk is full")
    told = disk_trouble(full, HOME, Path("/srv/dagster"))
    assert told is not None and told.startswith("/srv/dagster cannot be written: there is no room")
    assert "set DAGSTER_HOME" in told


def test_torch_says_only_that_it_could_not_write(tmp_path: Path) -> None:
    error = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert disk_trouble(error, tmp_path / "not" / "there") is None  # there is room


def test_sqlites_io_error_is_no_room_where_there_is_none(small_disk: Path) -> None:
    error = RuntimeError("(sqlite3.OperationalError) disk I/O error")
    assert disk_trouble(error, HOME, small_disk) is None
    with nearly_full(small_disk, 0):
        told = disk_trouble(error, HOME, small_disk)
        assert told is not None and "no room left" in told and str(small_disk) in told
        torch_says = RuntimeError("PytorchStreamWriter failed writing file data/0")
        told = disk_trouble(torch_says, small_disk / "home")
        assert told is not None and "no room left" in told


# -- on real file systems -----------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no small disk: {error}")
    if done.returncode:
        pytest.skip(f"no small disk: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextmanager
def nearly_full(disk: Path, pages: int) -> Iterator[None]:
    """Leaves room for that many pages of 4 KiB."""
    filler = disk / "filler"
    found = os.statvfs(disk)
    size = found.f_bavail * found.f_frsize - pages * 4096
    with filler.open("wb") as file:
        file.write(b"\0" * max(size, 0))
    yield
    filler.unlink()


def users(*numbers: int) -> pd.DataFrame:
    return pd.DataFrame({"user_id": list(numbers), "split": ["train"] * len(numbers)})


def litter(store: Store) -> list[Path]:
    root = Path(str(store.root))
    return [path for path in root.rglob(".*") if path.suffix != ".lock"]


def test_a_table_on_a_disk_that_fills_up_at_any_byte(small_disk: Path) -> None:
    """The table, its pointer and the views, each in turn, until there is room for all."""
    store = Store.at(small_disk / "home")
    store.publish_table(TABLE, PARTITION, users(1))
    publish_warehouse(store)
    size = (small_disk / "home" / WAREHOUSE).stat().st_size
    seen, refusals = [], []
    enough = 6 + size // 4096 + 8
    for pages in (*range(7), enough // 3, enough // 2, enough):
        wanted = list(range(2, 3 + pages))
        with nearly_full(small_disk, pages):
            try:
                store.publish_table(TABLE, PARTITION, users(*wanted))
                seen.append("table")
                publish_warehouse(store)
                seen.append("views")
            except StoreError as error:
                refusals.append(str(error))
        held = store.read_table(TABLE, PARTITION).frame["user_id"].tolist()
        assert held in (wanted, [1]) or held[0] == 2  # the old or the new, whole
        with duckdb.connect(str(small_disk / "home" / WAREHOUSE), read_only=True) as views:
            assert views.sql(f"SELECT count(*) FROM {TABLE}").fetchall()[0][0] >= 1
        assert litter(store) == []
    assert all(str(small_disk) in said and "Make room" in said for said in refusals)
    assert seen[-1] == "views" and refusals
    assert store.read_table(TABLE, PARTITION).frame["user_id"].tolist() == wanted


def test_a_checkpoint_on_a_full_disk_stays_in_its_work_directory(small_disk: Path) -> None:
    store = Store.at(small_disk / "home")

    def publish(version: str) -> Path:
        files = store.work_directory(MODEL, PARTITION, version) / "files"
        if not files.exists():
            files.mkdir()
            (files / "model.safetensors").write_bytes(version.encode() * 1000)
        return store.publish_checkpoint(
            MODEL, PARTITION, version, files, determinants={}, facts={"losses": [1.0] * 2000}
        )

    old = sha256_file(publish("old") / "model.safetensors")
    files = store.work_directory(MODEL, PARTITION, "new") / "files"
    files.mkdir()
    (files / "model.safetensors").write_bytes(b"new" * 1000)
    refusals = []
    for pages in range(12):
        with nearly_full(small_disk, pages):
            try:
                publish("new")
                break
            except StoreError as error:
                refusals.append(str(error))
        # Trained is trained: published, or still there to be published.
        assert (files / "model.safetensors").exists() or store.find_intact(MODEL, PARTITION, "new")
        current = store.checkpoint(MODEL, PARTITION)
        assert current.name == "old" and sha256_file(current / "model.safetensors") == old
        assert litter(store) == []
        if not files.exists():  # renamed, and no room for the pointer
            break
    assert refusals
    assert all(str(small_disk) in said and "Make room" in said for said in refusals)
    if files.exists():
        publish("new")
    elif store.current(MODEL, PARTITION, "checkpoints") != "new":
        store.adopt(MODEL, PARTITION, "new")
    assert store.checkpoint(MODEL, PARTITION).name == "new"


def test_a_limit_on_file_sizes_is_told(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    store.publish_table(TABLE, PARTITION, users(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(StoreError, match="Raise `ulimit -f`"):
            store.publish_table(TABLE, PARTITION, users(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.read_table(TABLE, PARTITION).frame["user_id"].tolist() == [1]
    assert litter(store) == []


@pytest.fixture
def bound() -> Iterator[None]:
    """Permission bits bind also root: this thread gives up the capability to pass over them."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    assert libc.capget(header, held) == 0
    less = (ctypes.c_uint32 * 6)(held[0] & ~0b110, *held[1:])
    assert libc.capset(header, less) == 0
    yield
    assert libc.capset(header, held) == 0


def test_a_read_only_home_is_told_and_stays_readable(bound: None, tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    version = store.publish_table(TABLE, PARTITION, users(1))
    publish_warehouse(store)
    directories = [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]
    for path in directories:
        path.chmod(0o555)
    try:
        for write in (
            lambda: store.publish_table(TABLE, PARTITION, users(2)),
            lambda: store.work_directory(MODEL, PARTITION, "abc"),
            lambda: publish_warehouse(store),
        ):
            with pytest.raises(StoreError, match=f"{tmp_path}.* cannot be written: .*forbid it"):
                write()
        assert store.current(TABLE, PARTITION, "tables") == version
        assert store.read_table(TABLE, PARTITION).frame["user_id"].tolist() == [1]
    finally:
        for path in directories:
            path.chmod(0o755)
    store.publish_table(TABLE, PARTITION, users(2))
    assert store.read_table(TABLE, PARTITION).frame["user_id"].tolist() == [2]


@pytest.mark.timeout(20)
def test_a_circle_of_causes_comes_to_an_end(tmp_path: Path) -> None:
    """As Dagster leaves one: a step's error is raised from within the handler of its wrapper."""
    error = ValueError("no disk in this")
    wrapper = RuntimeError("the step failed")
    wrapper.__cause__, error.__context__ = error, wrapper
    assert disk_trouble(error, tmp_path) is None
