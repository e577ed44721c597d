"""The store keeps its promise: at any moment either the old or the new is readable, verified."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.schemas import USER_SPLITS
from llmrec_assets.ground.store import (
    MANIFEST,
    Store,
    checkpoint_version,
    read_manifest,
    sha256_file,
    verify_checkpoint,
)
from llmrec_assets.ground.tables import conform, content_version

ASSET, PARTITION = "user_splits", "sample|tiny"
MODEL = "sft_checkpoint"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path / "home")


def splits(*user_ids: int) -> pd.DataFrame:
    return pd.DataFrame({"user_id": list(user_ids), "split": ["train"] * len(user_ids)})


def users(store: Store, version: str | None = None) -> list[int]:
    return store.read_table(ASSET, PARTITION, version).frame["user_id"].tolist()


def publish(store: Store, *user_ids: int) -> str:
    return store.publish_table(ASSET, PARTITION, splits(*user_ids))


def directory_of(store: Store, kind: str, asset: str) -> Path:
    return Path(str(store.root)) / kind / asset / "sample" / "tiny"


def litter(store: Store) -> list[str]:
    return [path.name for path in Path(str(store.root)).rglob(".*") if path.suffix != ".lock"]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


# -- tables -------------------------------------------------------------------------------


def test_a_published_table_is_current_and_read_back(store):
    version = publish(store, 1, 2)
    assert store.current(ASSET, PARTITION, kind="tables") == version
    stored = store.read_table(ASSET, PARTITION)
    assert stored.version == version
    assert stored.frame.to_dict("list") == {"user_id": [1, 2], "split": ["train", "train"]}
    assert version == content_version(conform(splits(1, 2), USER_SPLITS, ASSET))


def test_the_file_lies_where_the_design_says(store):
    version = publish(store, 1)
    path = Path(str(store.root)) / "tables/user_splits/sample/tiny" / f"{version}.parquet"
    assert pq.read_table(path).schema.equals(USER_SPLITS)
    pointer = json.loads((path.parent / "current.json").read_text())
    assert pointer == {"version": version}
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "current.json"])


def test_frame_and_table_publish_the_same_version(store):
    frame = splits(1, 2)
    assert publish(store, 1, 2) == store.publish_table(
        ASSET, PARTITION, conform(frame, USER_SPLITS, ASSET)
    )


def test_an_empty_frame_is_published(store):
    publish(store)
    stored = store.read_table(ASSET, PARTITION).frame
    assert len(stored) == 0
    assert list(stored.columns) == ["user_id", "split"]


def test_partitions_and_assets_do_not_mix(store):
    publish(store, 1)
    store.publish_table(ASSET, "sample|paper", splits(2))
    assert users(store) == [1]
    assert store.current(ASSET, "ml-1m|tiny", kind="tables") is None
    assert [
        (asset, partition, file.name.removesuffix(".parquet"))
        for asset, partition, file in store.current_tables()
    ] == [
        (ASSET, key, store.current(ASSET, key, kind="tables"))
        for key in ("sample|paper", "sample|tiny")
    ]


@pytest.mark.parametrize("home", ["tables", "a/tables/b", "checkpoints", "o'neill & søn"])
def test_current_tables_does_not_trip_over_the_name_of_the_home(tmp_path, home):
    store = Store.at(tmp_path / home)
    publish(store, 1)
    assert [key[:2] for key in store.current_tables()] == [(ASSET, PARTITION)]


def test_no_home_has_no_tables(tmp_path):
    assert list(Store.at(tmp_path / "nowhere").current_tables()) == []
    assert not (tmp_path / "nowhere").exists()


def test_never_materialized_says_what_to_do(store):
    with pytest.raises(StoreError, match=r"user_splits has not been materialized for sample\|tiny"):
        store.read_table(ASSET, PARTITION)
    with pytest.raises(StoreError, match=r"sft_checkpoint has not been materialized"):
        store.checkpoint(MODEL, PARTITION)


@pytest.mark.parametrize(
    "bad",
    [
        splits(1).rename(columns={"split": "part"}),
        splits(1).assign(split=None),
        splits(1).assign(user_id=2**40),
        pa.table({"user_id": pa.array([1], pa.int64()), "split": ["train"]}),
        pa.table([pa.array([None], pa.int32()), pa.array(["train"])], schema=USER_SPLITS),
    ],
    ids=["columns", "null", "range", "table-type", "table-null"],
)
def test_a_failing_schema_leaves_the_previous_materialization(store, bad):
    version = publish(store, 1)
    before = sorted(directory_of(store, "tables", ASSET).iterdir())
    with pytest.raises(StoreError, match="user_splits"):
        store.publish_table(ASSET, PARTITION, bad)
    assert store.current(ASSET, PARTITION, kind="tables") == version
    assert users(store) == [1]
    assert sorted(directory_of(store, "tables", ASSET).iterdir()) == before


def test_publishing_the_same_content_again_changes_nothing(store):
    assert publish(store, 1) == publish(store, 1)
    assert len(list(directory_of(store, "tables", ASSET).glob("*.parquet"))) == 1
    assert users(store) == [1]


def test_publishing_again_mends_a_damaged_table(store):
    version = publish(store, *range(100))
    path = Path(str(store.table_path(ASSET, PARTITION, version)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match=rf"{version}.parquet is damaged"):
        store.read_table(ASSET, PARTITION)
    publish(store, *range(100))
    assert users(store) == list(range(100))


def test_going_back_to_older_content(store):
    first = publish(store, 1)
    publish(store, 2)
    assert publish(store, 1) == first
    assert users(store) == [1]


def test_older_versions_stay_readable(store):
    """Only retention removes a version: a reader of an older result loses nothing unasked."""
    versions = [publish(store, user) for user in range(8)]
    assert [users(store, version) for version in versions] == [[user] for user in range(8)]


def test_a_flipped_byte_is_never_read_as_another_value(store):
    """Parquet's pages have checksums; a flipped byte elsewhere changes no value, or is told."""
    frame = pd.DataFrame({"user_id": range(40), "split": ["train", "test"] * 20})
    version = store.publish_table(ASSET, PARTITION, frame)
    path = Path(str(store.table_path(ASSET, PARTITION, version)))
    whole, refusals = path.read_bytes(), []
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            read = store.read_table(ASSET, PARTITION).frame
        except StoreError as error:
            refusals.append(str(error))
        else:
            assert read["user_id"].tolist() == list(range(40))
            assert read["split"].tolist() == ["train", "test"] * 20
    assert len(refusals) > 10
    assert all(str(path) in said or "other columns" in said for said in refusals)


def test_a_damaged_pointer_is_named(store):
    publish(store, 1)
    pointer = directory_of(store, "tables", ASSET) / "current.json"
    for text in ("", "{", "[]", "{}", "\x00"):
        pointer.write_text(text)
        with pytest.raises(StoreError, match=r"current\.json is damaged.* materialize the asset"):
            users(store)


# -- crashes ------------------------------------------------------------------------------


class CrashError(Exception):
    pass


@contextlib.contextmanager
def failing(name: str, at: int, *, after: bool = False):
    """``os.<name>`` raises at its ``at``-th call, instead of its work or right after it."""
    real: Callable = getattr(os, name)
    calls = itertools.count()

    def call(*arguments, **keywords):
        if next(calls) != at:
            return real(*arguments, **keywords)
        if after:
            real(*arguments, **keywords)
        raise CrashError(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, call)
        yield


def crashes(action: Callable[[], object], undo: Callable[[], None]):
    """Runs ``action`` with a crash before and after each rename and each sync it does."""
    for name, after in itertools.product(("replace", "fsync"), (False, True)):
        for at in itertools.count():
            undo()
            try:
                with failing(name, at, after=after):
                    action()
            except CrashError:
                yield name, at, after
            else:
                assert at > 0, f"{name} is never called"
                break


def test_a_crash_while_publishing_a_table_leaves_the_old_or_the_new(store):
    old = publish(store, 1)
    new = content_version(conform(splits(2), USER_SPLITS, ASSET))
    seen = {}

    def undo():
        shutil.rmtree(str(store.root))
        publish(store, 1)

    for point in crashes(lambda: publish(store, 2), undo):
        found = store.read_table(ASSET, PARTITION)
        assert (found.version, found.frame["user_id"].tolist()) in [(old, [1]), (new, [2])]
        assert [file.name for *_, file in store.current_tables()] == [f"{found.version}.parquet"]
        assert litter(store) == []
        seen[point] = found.version
        publish(store, 2)
        assert users(store) == [2]
    # The pointer changes with the second rename and not before.
    assert seen[("replace", 0, False)] == seen[("replace", 0, True)] == old
    assert seen[("replace", 1, False)] == old
    assert seen[("replace", 1, True)] == new


def test_a_full_disk_leaves_the_old(store, monkeypatch):
    publish(store, 1)
    real = Path.open

    def full(self, mode="r", *arguments, **keywords):
        if "w" in mode and self.suffix != ".lock":
            real(self, mode, *arguments, **keywords).close()
            raise OSError(28, "No space left on device")
        return real(self, mode, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StoreError, match=r"no room left on its disk\. Make room"):
        publish(store, 2)
    monkeypatch.undo()
    assert users(store) == [1]
    assert litter(store) == []


def test_what_a_kill_left_is_ignored_and_removed(store):
    version = publish(store, 1)
    directory = directory_of(store, "tables", ASSET)
    for name in (f".{version}.parquet.{uuid.uuid4().hex}", f".current.json.{uuid.uuid4().hex}"):
        (directory / name).write_bytes(b"half")
    assert users(store) == [1]
    assert len(list(store.current_tables())) == 1
    publish(store, 2)
    assert litter(store) == []
    assert users(store) == [2]


PUBLISHER = """
import itertools, os, random, signal, sys, time
import pandas as pd
import pyarrow.parquet
from llmrec_assets.ground.store import Store

store = Store.at(sys.argv[1])

def publish(user):
    frame = pd.DataFrame({"user_id": [user] * 50, "split": ["train"] * 50})
    store.publish_table("user_splits", "sample|tiny", frame)
"""


def python(script: str, *arguments: object, **keywords) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISHER + textwrap.dedent(script), *map(str, arguments)],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        **keywords,
    )


def test_killed_at_any_moment_the_current_table_reads_fine(store):
    """One process forks publishers and kills them: importing pandas fifteen times takes longer."""
    script = """
    random.seed(int(sys.argv[2]))
    for round_ in range(15):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for user in itertools.count(1000 * round_):
                publish(user)
                os.write(writer, b".")
        os.read(reader, 1)  # from its first publication on, at a random moment
        time.sleep(random.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WTERMSIG(status) == signal.SIGKILL else status, flush=True)
        sys.stdin.readline()
    """
    with python(script, store.root, 3) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for round_ in range(15):
            assert process.stdout.readline() == "killed\n"
            stored = store.read_table(ASSET, PARTITION)
            assert stored.frame["user_id"].nunique() == 1
            # not merely readable: the bytes are those the version names
            table = conform(stored.frame, USER_SPLITS, ASSET)
            assert content_version(table) == stored.version
            assert stored.frame["user_id"][0] // 1000 == round_
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    publish(store, 7)  # the lock died with its holder
    assert litter(store) == []


def test_two_processes_publish_the_same_table_at_once(store):
    script = """
    children = []
    for offset in (0, 1):
        child = os.fork()
        if child == 0:
            try:
                for step in range(25):
                    publish((step + offset) % 3)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    print([os.waitpid(child, 0)[1] for child in children])
    """
    with python(script, store.root) as process:
        output, _ = process.communicate(timeout=60)
    assert output == "[0, 0]\n"
    stored = store.read_table(ASSET, PARTITION)
    assert stored.frame["user_id"].tolist() in ([k] * 50 for k in range(3))
    assert litter(store) == []


# -- other file systems -------------------------------------------------------------------


def test_tables_live_on_any_upath():
    store = Store.at(f"memory://{uuid.uuid4().hex}/home")
    first, second = publish(store, 1), publish(store, 2)
    assert users(store) == [2]
    assert users(store, first) == [1]
    (found,) = store.current_tables()
    assert found[:2] == (ASSET, PARTITION)
    assert found[2].name == f"{second}.parquet"
    publish(store)
    assert users(store) == []


def test_checkpoints_need_a_local_home():
    store = Store.at("memory://house/home")
    with pytest.raises(StoreError, match="local directory"):
        store.checkpoint(MODEL, PARTITION, "abc")


def test_a_home_is_absolute_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = str(tmp_path.resolve() / "home")
    for written in ("home", "~/home", f"file://{expected}", UPath(expected), Path("home")):
        assert str(Store.at(written).root) == expected


# -- checkpoints --------------------------------------------------------------------------


def build(store: Store, version: str, content: str = "weights") -> Path:
    files = store.work_directory(MODEL, PARTITION, version) / "files"
    (files / "adapter").mkdir(parents=True)
    (files / "model.safetensors").write_text(content)
    (files / "adapter" / "config.json").write_text('{"r": 4}')
    return files


def publish_model(store: Store, version: str, content: str = "weights") -> Path:
    return store.publish_checkpoint(
        MODEL,
        PARTITION,
        version,
        build(store, version, content),
        determinants={"seed": 1, "titel": "Ça"},
        facts={"loss": 0.5},
    )


def test_a_checkpoint_with_its_manifest(store):
    path = publish_model(store, "abc")
    assert path == directory_of(store, "checkpoints", MODEL) / "abc"
    assert store.checkpoint(MODEL, PARTITION) == path
    manifest = read_manifest(path)
    assert manifest.pop("published_at").endswith("+00:00")
    assert manifest == {
        "asset": MODEL,
        "partition": PARTITION,
        "version": "abc",
        "determinants": {"seed": 1, "titel": "Ça"},
        "facts": {"loss": 0.5},
        "files": {
            # printf weights | sha256sum
            "model.safetensors": {
                "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
                "bytes": 7,
            },
            "adapter/config.json": {
                "sha256": sha256_file(path / "adapter" / "config.json"),
                "bytes": 8,
            },
        },
    }
    assert not (store.work_directory(MODEL, PARTITION, "abc") / "files").exists()


@pytest.mark.parametrize(
    "place", ["model.safetensors", "adapter/config.json", "adapter/manifest.json"]
)
@pytest.mark.parametrize("harm", [damage, Path.unlink])
def test_a_changed_or_missing_file_is_named(store, place, harm):
    files = build(store, "abc")
    (files / "adapter" / "manifest.json").write_text("someone else's manifest")
    path = store.publish_checkpoint(MODEL, PARTITION, "abc", files, determinants={}, facts={})
    verify_checkpoint(path)
    harm(path / place)
    said = "is missing" if harm is Path.unlink else "does not match"
    with pytest.raises(StoreError, match=rf"abc/{place} {said}"):
        store.checkpoint(MODEL, PARTITION)
    assert store.find_intact(MODEL, PARTITION, "abc") is None


def test_a_file_that_grew_or_shrank_is_named(store):
    path = publish_model(store, "abc")
    with (path / "model.safetensors").open("a") as file:
        file.write("x")
    with pytest.raises(StoreError, match=r"abc/model\.safetensors does not match"):
        verify_checkpoint(path)


def test_a_missing_manifest_is_named(store):
    (publish_model(store, "abc") / MANIFEST).unlink()
    with pytest.raises(StoreError, match=r"abc: manifest\.json is missing"):
        store.checkpoint(MODEL, PARTITION)
    assert store.find_intact(MODEL, PARTITION, "abc") is None


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"files": []}', "\x00\x01"])
def test_a_damaged_manifest_is_named(store, text):
    path = publish_model(store, "abc")
    (path / MANIFEST).write_text(text)
    with pytest.raises(StoreError, match=r"abc: manifest\.json is damaged"):
        store.checkpoint(MODEL, PARTITION)
    assert store.find_intact(MODEL, PARTITION, "abc") is None


def test_a_manifest_truncated_anywhere_is_damaged(store):
    path = publish_model(store, "abc")
    whole = (path / MANIFEST).read_bytes().rstrip()
    for end in range(0, len(whole), 7):
        (path / MANIFEST).write_bytes(whole[:end])
        with pytest.raises(StoreError, match="damaged"):
            read_manifest(path)


def test_a_vanished_checkpoint_is_an_error(store):
    shutil.rmtree(publish_model(store, "abc"))
    with pytest.raises(StoreError, match="abc"):
        store.checkpoint(MODEL, PARTITION)


def test_forced_attempts_are_numbered_and_the_newest_is_current(store):
    names = [publish_model(store, "abc", f"attempt {n}").name for n in (1, 2, 3)]
    assert names == ["abc", "abc-2", "abc-3"]
    assert store.checkpoint(MODEL, PARTITION).name == "abc-3"
    assert read_manifest(store.checkpoint(MODEL, PARTITION))["version"] == "abc-3"
    assert (
        store.checkpoint(MODEL, PARTITION, "abc-2") / "model.safetensors"
    ).read_text() == "attempt 2"


def test_ten_attempts_sort_by_number(store):
    for n in range(1, 12):
        publish_model(store, "abc", f"attempt {n}")
    found = store.find_intact(MODEL, PARTITION, "abc")
    assert found is not None
    assert found.name == "abc-11"


def test_find_intact_prefers_the_newest_and_skips_the_damaged(store):
    assert store.find_intact(MODEL, PARTITION, "abc") is None
    first = publish_model(store, "abc")
    second = publish_model(store, "abc")
    publish_model(store, "abcd")
    publish_model(store, "ab")
    assert store.find_intact(MODEL, PARTITION, "abc") == second
    damage(second / "model.safetensors")
    assert store.find_intact(MODEL, PARTITION, "abc") == first
    (first / MANIFEST).unlink()
    assert store.find_intact(MODEL, PARTITION, "abc") is None


def test_a_damaged_version_is_not_overwritten(store):
    first = publish_model(store, "abc")
    damage(first / "model.safetensors")
    assert publish_model(store, "abc").name == "abc-2"
    assert first.exists()
    assert store.checkpoint(MODEL, PARTITION).name == "abc-2"


def test_adopt_makes_an_old_checkpoint_current_and_new_again(store):
    for name in ("abc", "def"):
        publish_model(store, name)
    os.utime(directory_of(store, "checkpoints", MODEL) / "abc", (0, 0))
    store.adopt(MODEL, PARTITION, "abc")
    assert store.checkpoint(MODEL, PARTITION).name == "abc"
    # retention counts it as new
    assert (store.checkpoint(MODEL, PARTITION)).stat().st_mtime > time.time() - 60


def test_adopting_what_is_not_there_leaves_the_pointer(store):
    publish_model(store, "abc")
    with pytest.raises(StoreError, match="no version nope"):
        store.adopt(MODEL, PARTITION, "nope")
    assert store.checkpoint(MODEL, PARTITION).name == "abc"


def test_a_crash_while_publishing_a_checkpoint_leaves_the_old_or_the_new(store):
    seen = {}

    def undo():
        shutil.rmtree(str(store.root), ignore_errors=True)
        publish_model(store, "old")
        build(store, "new")

    def act():
        files = store.work_directory(MODEL, PARTITION, "new") / "files"
        store.publish_checkpoint(MODEL, PARTITION, "new", files, determinants={}, facts={})

    for point in crashes(act, undo):
        current = store.checkpoint(MODEL, PARTITION)
        files = store.work_directory(MODEL, PARTITION, "new") / "files"
        intact = store.find_intact(MODEL, PARTITION, "new")
        assert litter(store) == []
        # What was trained is never lost: it is published whole, or still in the work directory.
        assert (intact is None) == files.exists()
        if intact is None:
            assert current.name == "old"
            act()
        else:
            store.adopt(MODEL, PARTITION, intact.name)
        assert store.checkpoint(MODEL, PARTITION).name == "new"
        seen[point] = current.name
    # renames: the manifest, the directory, the pointer
    assert [seen["replace", n, True] for n in range(3)] == ["old", "old", "new"]
    assert [seen["replace", n, False] for n in range(3)] == ["old", "old", "old"]


def test_the_work_directory_persists_until_it_is_removed(store):
    work = store.work_directory(MODEL, PARTITION, "abc")
    (work / "checkpoint-50").mkdir()
    (work / "checkpoint-50" / "state.json").write_text("{}")
    again = Store.at(store.root).work_directory(MODEL, PARTITION, "abc")
    assert again == work
    assert (again / "checkpoint-50" / "state.json").read_text() == "{}"
    assert store.work_directory(MODEL, PARTITION, "def") != work
    assert store.work_directory(MODEL, "sample|cpu", "abc") != work
    store.remove_work(work)
    assert not work.exists()
    store.remove_work(work)


def test_checkpoint_version_is_the_hash_of_what_determines_it():
    determinants = {"seed": 1, "recipe": {"epochs": 3, "lr": 5e-5}, "upstream": "abc"}
    reordered = {"upstream": "abc", "recipe": {"lr": 5e-5, "epochs": 3}, "seed": 1}
    version = checkpoint_version(MODEL, determinants)
    assert len(version) == 16
    assert int(version, 16) >= 0
    assert checkpoint_version(MODEL, reordered) == version
    others = {
        checkpoint_version("dpo_checkpoint", determinants),
        checkpoint_version(MODEL, determinants | {"seed": 2}),
        checkpoint_version(MODEL, determinants | {"seed": "1"}),
        checkpoint_version(MODEL, determinants | {"recipe": {"epochs": 3}}),
    }
    assert len(others | {version}) == 5
