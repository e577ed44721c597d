"""The record travels with what it is about, and changes no version."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pandas as pd
import psutil
import pytest

from llmrec_assets.ground import surroundings
from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.provenance import Input, Provenance, read_provenance
from llmrec_assets.ground.store import MANIFEST, Store, read_manifest
from llmrec_assets.ground.warehouse import connect

PARTITION = "sample|tiny"
SPLITS = pd.DataFrame({"user_id": [1, 2], "split": ["train", "test"]})
RECORD = Provenance(
    inputs={"users": Input("sample", "0123")},
    run_id="run-1",
    made_at="2026-11-24T17:15:37+00:00",
    recipe={"name": "tiny", "description": "mit Ümlaut", "windows": {"top_k": 5}},
    seed=0,
    code="3",
    commit="c3f1f64",
    libraries={"torch": "2.13.0"},
    machine={"cpu": "A CPU", "cores": 2, "threads": 1, "gpu": None},
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path)


def publish_model(store: Store, **options: object) -> Path:
    work = store.work_directory("sft_checkpoint", PARTITION, "abc") / "files"
    work.mkdir()
    (work / "adapter_config.json").write_text("{}")
    facts = {"run_id": "run-0", "threads": 2, "libraries": {"torch": "2.12.0"}}
    determinants = {"prompts": "p", "seed": 7, "code": "2", "recipe": {"epochs": 1}}
    return store.publish_checkpoint(
        "sft_checkpoint", PARTITION, "abc", work, determinants=determinants, facts=facts, **options
    )


def test_a_tables_record_is_read_back_and_changes_neither_version_nor_content(store):
    plain = store.publish_table("user_splits", PARTITION, SPLITS)
    assert read_provenance(store, "user_splits", PARTITION, plain) is None
    version = store.publish_table("user_splits", PARTITION, SPLITS, RECORD.to_json())
    assert version == plain
    assert read_provenance(store, "user_splits", PARTITION, version) == RECORD
    assert store.read_table("user_splits", PARTITION).frame.to_dict() == SPLITS.to_dict()
    with connect(store) as connection:
        assert len(connection.sql("select * from user_splits").fetchall()) == 2


def test_a_table_published_again_with_the_same_content_shows_its_latest_run(store):
    store.publish_table("user_splits", PARTITION, SPLITS, RECORD.to_json())
    later = Provenance({}, run_id="run-2")
    version = store.publish_table("user_splits", PARTITION, SPLITS, later.to_json())
    assert read_provenance(store, "user_splits", PARTITION, version) == later


def test_a_checkpoints_record_stands_in_its_manifest(store):
    path = publish_model(store, provenance=RECORD.to_json())
    assert read_provenance(store, "sft_checkpoint", PARTITION, path.name) == RECORD
    assert path.name == "abc", "a version is the hash of its determinants alone"


def test_a_manifest_from_before_the_record_says_what_it_knows(store):
    path = publish_model(store)
    assert "provenance" not in read_manifest(path)
    made = read_provenance(store, "sft_checkpoint", PARTITION, path.name)
    assert made is not None
    assert (made.run_id, made.seed, made.code) == ("run-0", 7, "2")
    assert made.libraries == {"torch": "2.12.0"} and made.machine == {"threads": 2}
    assert made.recipe is None and made.commit is None and made.inputs == {}


def test_what_a_later_version_of_the_project_recorded_beside_is_ignored():
    told = {**RECORD.to_json(), "weather": "rain"}
    assert Provenance.from_json(json.loads(json.dumps(told))) == RECORD


def test_a_lost_or_damaged_version_is_named(store):
    version = store.publish_table("user_splits", PARTITION, SPLITS, RECORD.to_json())
    with pytest.raises(StoreError, match="version nope is not kept any more"):
        read_provenance(store, "user_splits", PARTITION, "nope")
    store.table_path("user_splits", PARTITION, version).write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="is damaged"):
        read_provenance(store, "user_splits", PARTITION, version)
    (publish_model(store) / MANIFEST).unlink()
    with pytest.raises(StoreError, match=f"{MANIFEST} is missing"):
        read_provenance(store, "sft_checkpoint", PARTITION, "abc")


# -- surroundings -------------------------------------------------------------------------------


def test_the_machine_is_told_without_its_name_or_a_path(monkeypatch):
    import torch

    monkeypatch.setattr(surroundings, "_used", False)
    assert surroundings.machine()["threads"] is None  # loaded, as in any forked step, is not used
    surroundings.use_models()
    told = surroundings.machine()
    assert told["threads"] == torch.get_num_threads() and told["cores"] >= 1
    assert told["gpu"] is None or torch.cuda.is_initialized()
    text = json.dumps([told, surroundings.library_versions(), surroundings.commit()])
    assert platform.node() not in text and str(Path.home()) not in text.replace('"/', "")
    assert not any(user.name in text.split('"') for user in psutil.users())


def test_the_required_packages_are_told_with_their_versions():
    versions = surroundings.library_versions()
    assert {"python", "torch", "transformers", "dagster", "pandas", "lenskit"} <= set(versions)
    assert versions["python"] == platform.python_version()
    assert "pytest" not in versions, "of the development's extras, none decides a result"


def test_outside_a_checkout_no_commit_is_told(tmp_path, monkeypatch):
    """Nor that of a repository around an installed copy."""
    surroundings.commit.cache_clear()
    (tmp_path / ".git").mkdir()
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(surroundings, "_PROJECT", tmp_path / "inside")
    assert surroundings.commit() is None
    surroundings.commit.cache_clear()
