"""The examination names every kind of damage, and mends what is safe to mend."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from llmrec_assets.ground import health
from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.health import Finding, examine
from llmrec_assets.ground.store import MANIFEST, Store, checkpoint_version
from llmrec_assets.ground.warehouse import WAREHOUSE, connect, publish_warehouse

PARTITION = "sample|tiny"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two versions of a table, a checkpoint, and the views."""
    store = Store.at(tmp_path / "home")
    for user in (1, 2):
        frame = pd.DataFrame({"user_id": [user], "split": ["train"]})
        store.publish_table("user_splits", PARTITION, frame)
    publish_model(store, seed=1)
    publish_warehouse(store)
    return store


def publish_model(store: Store, seed: int) -> Path:
    version = checkpoint_version("sft_checkpoint", {"seed": seed})
    files = store.work_directory("sft_checkpoint", PARTITION, version) / "files"
    files.mkdir()
    (files / "model.safetensors").write_bytes(b"weights" * 100)
    path = store.publish_checkpoint(
        "sft_checkpoint", PARTITION, version, files, determinants={"seed": seed}, facts={}
    )
    store.remove_work(files.parent)
    return path


def root(store: Store) -> Path:
    return Path(str(store.root))


def amiss(store: Store, repair: bool = False) -> list[Finding]:
    return [finding for finding in examine(store, repair) if finding.state != "ok"]


def test_all_is_well(store: Store) -> None:
    found = {finding.check: (finding.state, finding.what) for finding in examine(store)}
    assert {state for state, _ in found.values()} == {"ok"}
    assert found["tables"][1] == "2 versions hold what their names say"
    assert found["checkpoints"][1] == "1 versions match their manifests"
    assert found["views"][1] == f"{WAREHOUSE} shows the 1 tables in force"
    assert list(found) == [
        *("pointers", "tables", "checkpoints", "views"),
        *("leftovers", "work", "incoming", "disk"),
    ]


def test_a_home_that_is_not_there_is_no_problem(tmp_path: Path) -> None:
    (finding,) = examine(Store.at(tmp_path / "nowhere"))
    assert finding.state == "note"
    assert not (tmp_path / "nowhere").exists()


def test_object_storage_is_refused() -> None:
    with pytest.raises(StoreError, match="local directories"):
        examine(Store.at("memory://house/home"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("in_force", [True, False])
@pytest.mark.parametrize("harm", ["flip", "truncate", "swap"])
def test_a_damaged_table_is_named_and_left(store: Store, harm: str, in_force: bool) -> None:
    current = str(store.current("user_splits", PARTITION, "tables"))
    paths = sorted((root(store) / "tables/user_splits/sample/tiny").glob("*.parquet"))
    (path,) = [path for path in paths if (path.stem == current) == in_force]
    (other,) = [other for other in paths if other != path]
    if harm == "flip":
        flip(path)
    elif harm == "truncate":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        shutil.copyfile(other, path)
    damaged = path.read_bytes()
    (finding,) = [f for f in amiss(store, repair=True) if f.check == "tables"]
    assert finding.state == "problem"
    assert finding.what.startswith(f"user_splits {PARTITION} {path.stem}: ")
    assert finding.remedy == ("materialize user_splits again" if in_force else f"remove {path}")
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("harm", ["flip", "gone", "manifest", "no manifest", "empty manifest"])
def test_a_damaged_checkpoint_is_named_and_left(store: Store, harm: str) -> None:
    path = store.checkpoint("sft_checkpoint", PARTITION)
    if harm == "flip":
        flip(path / "model.safetensors")
    elif harm == "gone":
        (path / "model.safetensors").unlink()
    elif harm == "manifest":
        (path / MANIFEST).write_text('{"files": {"model.safetensors": 7}}')
    elif harm == "no manifest":
        (path / MANIFEST).unlink()
    else:
        (path / MANIFEST).write_text("")
    (finding,) = amiss(store, repair=True)
    assert (finding.check, finding.state) == ("checkpoints", "problem")
    assert path.name in finding.what
    assert finding.remedy == "materialize sft_checkpoint again"
    assert path.exists()


@pytest.mark.parametrize("text", ["", "{", '{"version": "0000000000000000"}'])
def test_a_pointer_to_nothing_is_named(store: Store, text: str) -> None:
    pointer = root(store) / "checkpoints/sft_checkpoint/sample/tiny/current.json"
    pointer.write_text(text)
    (finding,) = amiss(store)
    assert (finding.check, finding.state) == ("pointers", "problem")
    assert finding.what.startswith("checkpoints/sft_checkpoint/sample/tiny")


def test_a_damaged_pointer_of_a_table_hides_no_other_finding(store: Store) -> None:
    (root(store) / "tables/user_splits/sample/tiny/current.json").write_text("{")
    flip(store.checkpoint("sft_checkpoint", PARTITION) / "model.safetensors")
    assert [finding.check for finding in amiss(store)] == ["pointers", "checkpoints"]


@pytest.mark.parametrize("harm", ["gone", "damaged", "behind"])
def test_views_are_built_again(store: Store, harm: str) -> None:
    path = root(store) / WAREHOUSE
    if harm == "gone":
        path.unlink()
    elif harm == "damaged":
        path.write_bytes(b"no data base" * 1000)
    else:
        frame = pd.DataFrame({"user_id": [7], "split": ["test"]})
        store.publish_table("user_splits", PARTITION, frame)
    (finding,) = amiss(store)
    assert (finding.check, finding.state) == ("views", "problem")
    assert "llmrec health --repair" in finding.remedy
    (mended,) = amiss(store, repair=True)
    assert (mended.check, mended.state) == ("views", "mended")
    assert amiss(store) == []
    with duckdb.connect(str(path), read_only=True) as connection, connect(store) as memory:
        query = "SELECT * FROM user_splits"
        assert connection.sql(query).fetchall() == memory.sql(query).fetchall()


def test_what_a_kill_left_is_removed_once_it_is_old(store: Store) -> None:
    places = [
        root(store) / "tables/user_splits/sample/tiny/.abc.parquet.0123",
        root(store) / "checkpoints/sft_checkpoint/sample/tiny/.removed-0123/model.safetensors",
        root(store) / f".{WAREHOUSE}.0123",
    ]
    for path in places:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    assert amiss(store, repair=True) == []  # somebody may be writing them
    for path in (places[0], places[1].parent, places[2]):
        os.utime(path, (time.time() - 2 * 3600,) * 2)
    assert [f.state for f in amiss(store)] == ["problem"] * 3
    assert [f.state for f in amiss(store, repair=True)] == ["mended"] * 3
    assert amiss(store) == []
    assert not any(path.exists() for path in places)


def test_unfinished_work_is_told_and_only_removed_when_published(store: Store) -> None:
    done = store.checkpoint("sft_checkpoint", PARTITION).name
    (store.work_directory("sft_checkpoint", PARTITION, done) / "optimizer.pt").write_bytes(b"x")
    going_on = store.work_directory("sft_checkpoint", PARTITION, "00000000000000bb")
    assert sorted(f.state for f in amiss(store)) == ["note", "note"]
    found = {f.state: f.what for f in amiss(store, repair=True)}
    assert "its version is published: removed" in found["mended"]
    assert "unfinished, or going on" in found["note"]
    assert going_on.exists()
    assert len(amiss(store)) == 1


def test_quarantined_files_are_told_with_their_reason(store: Store) -> None:
    place = root(store) / "incoming" / "sample" / "quarantine"
    place.mkdir(parents=True)
    (place / "abc-new.csv").write_text("x")
    (place / "abc-new.csv.reason.txt").write_text("row 1 of new.csv is wrong\nThen move it back.\n")
    (finding,) = amiss(store)
    assert (finding.check, finding.state) == ("incoming", "note")
    assert finding.what == ("incoming/sample/quarantine/abc-new.csv: row 1 of new.csv is wrong")


def test_a_full_disk_is_a_problem(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(root(store))._replace(free=10)
    monkeypatch.setattr(health.shutil, "disk_usage", lambda _: usage)
    (finding,) = amiss(store)
    assert (finding.check, finding.state) == ("disk", "problem")
    assert "llmrec prune" in finding.remedy
