"""What may go: never what is in force, newest or cited, and nothing by halves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.retention import STALE_WORK_DAYS, plan, prune, published, unfinished
from llmrec_assets.ground.store import Store, builder_lock, checkpoint_version

PARTITION = "sample|tiny"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path / "home")


def age(path: Path, days: float) -> None:
    when = time.time() - days * 86_400
    os.utime(path, (when, when))


def publish_splits(store: Store, *user_ids: int, partition: str = PARTITION, days: float) -> str:
    frame = pd.DataFrame({"user_id": list(user_ids), "split": ["train"] * len(user_ids)})
    version = store.publish_table("user_splits", partition, frame)
    age(Path(str(store.table_path("user_splits", partition, version))), days)
    return version


def publish_model(store: Store, asset: str, days: float, **determinants: object) -> str:
    version = checkpoint_version(asset, determinants)
    files = store.work_directory(asset, PARTITION, version) / "files"
    files.mkdir()
    (files / "model.safetensors").write_bytes(b"w" * 1000)
    path = store.publish_checkpoint(
        asset, PARTITION, version, files, determinants=determinants, facts={}
    )
    store.remove_work(files.parent)
    age(path, days)
    return path.name


def names(store: Store, kind: str, asset: str) -> set[str]:
    return {v.name for v in published(store) if (v.kind, v.asset) == (kind, asset)}


def test_the_newest_of_every_partition_stay(store: Store) -> None:
    splits = [publish_splits(store, user, days=20 - user) for user in range(5)]
    other = publish_splits(store, 9, partition="sample|cpu", days=99)
    assert [version.name for version in plan(store, 3).versions] == splits[:2]
    prune(store, 3)
    assert names(store, "tables", "user_splits") == {*splits[2:], other}
    assert store.read_table("user_splits", PARTITION).frame["user_id"].tolist() == [4]
    assert plan(store, 3).versions == []


def test_a_training_may_remove_files_while_they_are_looked_at(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = store.work_directory("sft_checkpoint", PARTITION, "0" * 16)
    (work / "gone").write_text("x")
    (work / "kept").write_text("xyz")
    stat = Path.stat

    def told(self: Path, **options: bool) -> os.stat_result:
        if self.name == "gone":
            raise FileNotFoundError(errno.ENOENT, "gone", str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", told)
    (found,) = unfinished(store)
    assert (found.size, found.is_stale) == (3, False)


def test_somebodys_copy_is_no_version(store: Store) -> None:
    splits = [publish_splits(store, user, days=20 - user) for user in range(3)]
    kept = Path(str(store.table_path("user_splits", PARTITION, splits[0])))
    copy = kept.with_name("before.parquet")
    copy.write_bytes(kept.read_bytes())
    (kept.parents[len(PARTITION.split("|")) + 1] / "stray.parquet").write_bytes(b"")
    prune(store, 2)
    assert names(store, "tables", "user_splits") == set(splits[1:])
    assert copy.exists()


def test_the_version_in_force_stays_though_it_is_the_oldest(store: Store) -> None:
    """Somebody went back to it, or clocks went wrong."""
    splits = [publish_splits(store, user, days=20 - user) for user in range(5)]
    publish_splits(store, 0, days=99)
    prune(store, 2)
    assert names(store, "tables", "user_splits") == {splits[0], splits[3], splits[4]}
    assert store.current("user_splits", PARTITION, "tables") == splits[0]


def test_what_a_kept_checkpoint_was_made_from_stays_all_the_way_down(store: Store) -> None:
    """A champion's manifest names its policy, that policy its base and its prompts."""
    base = publish_model(store, "base_model", 50, seed=0)
    sft = publish_model(store, "sft_checkpoint", 49, base_model=base, seed=0)
    champion = publish_model(store, "champion", 48, policy=sft)
    later = []
    for n in range(1, 4):
        later.append(publish_model(store, "base_model", 30 - n, seed=n))
        publish_model(store, "sft_checkpoint", 30 - n, base_model=later[-1], seed=n)
    gone = {(v.asset, v.name) for v in plan(store, 2).versions}
    prune(store, 2)
    assert names(store, "checkpoints", "champion") == {champion}
    assert sft in names(store, "checkpoints", "sft_checkpoint")
    assert names(store, "checkpoints", "base_model") == {base, *later[1:]}
    assert gone == {
        ("base_model", later[0]),
        (
            "sft_checkpoint",
            checkpoint_version("sft_checkpoint", {"base_model": later[0], "seed": 1}),
        ),
    }


def rewritten(path: Path, metadata: dict[str, str]) -> None:
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)


@pytest.mark.parametrize("how", ["column", "metadata", "beside"])
def test_what_a_kept_table_cites_stays(store: Store, how: str) -> None:
    old = publish_model(store, "sft_checkpoint", 50, seed=0)
    for n in range(1, 4):
        publish_model(store, "sft_checkpoint", 30 - n, seed=n)
    directory = Path(str(store.root)) / "tables" / "user_metrics" / "sample" / "tiny"
    directory.mkdir(parents=True)
    path = directory / "00000000000000aa.parquet"
    if how == "column":
        columns = {"checkpoint_version": [old, None], "note": ["x", "y"]}
        pq.write_table(pa.table(columns), path)
    else:
        pq.write_table(pa.table({"n": [1]}), path)
    if how == "metadata":
        rewritten(path, {"lineage": json.dumps({"sft_checkpoint": old})})
    if how == "beside":
        path.with_suffix(".json").write_text(json.dumps({"inputs": [old]}))
    (directory / "current.json").write_text('{"version": "00000000000000aa"}')
    found = prune(store, 2)
    assert old in names(store, "checkpoints", "sft_checkpoint")
    assert found.kept["cited"] == 1
    path.unlink()
    prune(store, 2)
    assert old not in names(store, "checkpoints", "sft_checkpoint")


def test_a_longer_hash_cites_nothing(store: Store) -> None:
    """The sha256 of a file may begin with anything."""
    old = publish_model(store, "sft_checkpoint", 50, seed=0)
    for n in range(1, 3):
        publish_model(store, "sft_checkpoint", 30 - n, seed=n)
    publish_model(store, "report", 1, digest=old + "0" * 48)
    assert [version.name for version in plan(store, 2).versions] == [old]


def test_what_lies_beside_a_version_goes_with_it(store: Store) -> None:
    splits = [publish_splits(store, user, days=20 - user) for user in range(3)]
    beside = Path(str(store.table_path("user_splits", PARTITION, splits[0]))).with_suffix(".json")
    beside.write_text("{}")
    prune(store, 2)
    assert not beside.exists()


def test_damaged_versions_are_counted_as_versions(store: Store) -> None:
    splits = [publish_splits(store, user, days=20 - user) for user in range(3)]
    path = Path(str(store.table_path("user_splits", PARTITION, splits[2])))
    path.write_bytes(b"not parquet")
    pointer = path.with_name("current.json")
    pointer.write_text("{")
    assert [version.name for version in plan(store, 2).versions] == splits[:1]


@pytest.mark.parametrize("keep", [-1, 0, 1])
def test_fewer_than_two_are_refused(store: Store, keep: int) -> None:
    with pytest.raises(StoreError, match=f"keep is {keep}, expected at least 2"):
        prune(store, keep)


def test_the_listing_says_what_goes_and_what_stays(store: Store) -> None:
    for n in range(3):
        publish_model(store, "sft_checkpoint", 30 - n, seed=n)
    *entries, total = plan(store, 2).lines()
    (entry,) = entries
    assert entry.startswith("checkpoint  sft_checkpoint sample|tiny ")
    assert entry.endswith("  30 days old  0.0 MB")
    assert total == "0.0 MB to remove; kept: 1 in force, 1 of the newest 2"
    assert len(names(store, "checkpoints", "sft_checkpoint")) == 3


def test_a_kill_leaves_a_version_whole_or_gone(store: Store, monkeypatch) -> None:
    versions = [publish_model(store, "sft_checkpoint", 30 - n, seed=n) for n in range(3)]

    def killed(*_arguments: object, **_keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(store, 2)
    monkeypatch.undo()
    assert names(store, "checkpoints", "sft_checkpoint") == set(versions[1:])
    assert plan(store, 2).versions == []
    publish_model(store, "sft_checkpoint", 0, seed=9)
    directory = Path(str(store.root)) / "checkpoints" / "sft_checkpoint" / "sample" / "tiny"
    assert list(directory.glob(".*")) == []


def test_an_empty_or_absent_home_has_nothing_to_remove(tmp_path: Path) -> None:
    assert plan(Store.at(tmp_path / "nowhere"), 5).lines() == ["0.0 MB to remove; kept: nothing"]
    assert not (tmp_path / "nowhere").exists()


# -- work ---------------------------------------------------------------------------------


def test_work_goes_when_its_version_is_published_or_it_was_left_long_ago(store: Store) -> None:
    done = publish_model(store, "sft_checkpoint", 1, seed=0)
    for name in (done, "00000000000000bb", "00000000000000cc"):
        work = store.work_directory("sft_checkpoint", PARTITION, name)
        (work / "checkpoint-25").mkdir()
        (work / "checkpoint-25" / "optimizer.pt").write_bytes(b"x" * 100)
    for path in (work, *work.rglob("*")):
        age(path, STALE_WORK_DAYS + 1)
    assert [w.name for w in unfinished(store)] == sorted((done, "00000000000000bb", work.name))
    assert {w.name for w in prune(store, 5).work} == {done, work.name}
    assert [w.name for w in unfinished(store)] == ["00000000000000bb"]


def test_work_that_somebody_is_at_stays(store: Store) -> None:
    done = publish_model(store, "sft_checkpoint", 1, seed=0)
    work = store.work_directory("sft_checkpoint", PARTITION, done)
    with FileLock(builder_lock(store, "sft_checkpoint", PARTITION)):
        assert prune(store, 5).work == []
    assert work.exists()
    assert [w.name for w in prune(store, 5).work] == [done]
