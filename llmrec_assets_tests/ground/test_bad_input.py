"""Damaged checkpoints, tables and environments, and the page that lists every case."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import bad_input
import pandas as pd
import pytest
from bad_input import CHECKPOINT, ENVIRONMENT, TABLE, BadEnvironment, Harm
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_assets.ground import alerts, sources
from llmrec_assets.ground.errors import LlmrecError, StoreError
from llmrec_assets.ground.store import MANIFEST, Store, verify_checkpoint
from llmrec_assets.orchestration import ticks

PROJECT = Path(__file__).resolve().parents[2]
MODEL, ASSET, PARTITION = "sft_checkpoint", "user_splits", "sample|tiny"


def test_the_page_lists_these_cases() -> None:
    written = (PROJECT / "docs" / "bad-input.md").read_text(encoding="utf-8")
    assert written == bad_input.page(), (
        "write it again: python llmrec_assets_tests/bad_input.py > docs/bad-input.md"
    )
    assert sum(len(table.rows) for table in bad_input.tables()) >= 60


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path / "home")


def publish_model(store: Store) -> Path:
    version = "0123456789abcdef"
    files = store.work_directory(MODEL, PARTITION, version) / "files"
    files.mkdir()
    (files / "model.safetensors").write_bytes(b"weights" * 100)
    (files / "config.json").write_text('{"r": 4}')
    return store.publish_checkpoint(MODEL, PARTITION, version, files, determinants={}, facts={})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def write(text: str | bytes) -> Callable[[Path], object]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda path: path.write_bytes(data)


#: Harm → (file in the checkpoint's directory, what is done to it).
TO_A_CHECKPOINT: dict[str, tuple[str, Callable[[Path], object]]] = {
    "flip": ("model.safetensors", flip),
    "grow": ("model.safetensors", grow),
    "cut": ("model.safetensors", cut),
    "gone": ("model.safetensors", Path.unlink),
    "flip-config": ("config.json", flip),
    "no-manifest": (MANIFEST, Path.unlink),
    "empty-manifest": (MANIFEST, write("")),
    "cut-manifest": (MANIFEST, cut),
    "list-manifest": (MANIFEST, write("[]")),
    "no-files": (MANIFEST, write("{}")),
    "bad-fact": (MANIFEST, write('{"files": {"model.safetensors": 7}}')),
    "binary-manifest": (MANIFEST, write(b"\xff\x00\x01")),
    "vanished": (".", shutil.rmtree),
    "pointer": ("../current.json", cut),
}


@pytest.mark.parametrize("harm", CHECKPOINT, ids=lambda harm: harm.what)
def test_a_damaged_checkpoint_is_refused_by_name_left_and_made_again(
    store: Store, harm: Harm
) -> None:
    path = publish_model(store)
    file, do = TO_A_CHECKPOINT[harm.name]
    do(path / file)
    left = {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(StoreError) as refused:
        store.checkpoint(MODEL, PARTITION)
    assert harm.said in str(refused.value)
    assert "again" in str(refused.value)
    if harm.name != "pointer":
        assert path.name in str(refused.value)
        assert store.find_intact(MODEL, PARTITION, path.name) is None
    again = publish_model(store)
    verify_checkpoint(store.checkpoint(MODEL, PARTITION))
    assert store.checkpoint(MODEL, PARTITION) == again
    if again != path:
        assert left == {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


TO_A_TABLE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "cut": ("{version}.parquet", cut),
    "text": ("{version}.parquet", write("user_id,split\n1,train\n")),
    "empty": ("{version}.parquet", write("")),
    "columns": (
        "{version}.parquet",
        lambda path: pd.DataFrame({"user": [1], "part": ["train"]}).to_parquet(path),
    ),
    "vanished": ("{version}.parquet", Path.unlink),
    "pointer": ("current.json", cut),
    "list-pointer": ("current.json", write("[]")),
}


@pytest.mark.parametrize("harm", TABLE, ids=lambda harm: harm.what)
def test_a_damaged_table_is_refused_by_name_and_made_again(store: Store, harm: Harm) -> None:
    frame = pd.DataFrame({"user_id": [1, 2], "split": ["train", "test"]})
    version = store.publish_table(ASSET, PARTITION, frame)
    file, do = TO_A_TABLE[harm.name]
    do(
        Path(str(store.table_path(ASSET, PARTITION, version))).with_name(
            file.format(version=version)
        )
    )
    with pytest.raises(StoreError) as refused:
        store.read_table(ASSET, PARTITION)
    assert harm.said in str(refused.value)
    assert ASSET in str(refused.value)
    assert store.publish_table(ASSET, PARTITION, frame) == version
    assert store.read_table(ASSET, PARTITION).frame.equals(frame.astype({"user_id": "int32"}))


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=300), keep=st.integers(0, 400))
def test_a_manifest_of_any_bytes_is_refused_or_refuses_the_files(
    content: bytes, keep: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = Store.at(tmp_path_factory.mktemp("home"))
    path = publish_model(store)
    whole = (path / MANIFEST).read_bytes()
    (path / MANIFEST).write_bytes(whole[:keep] + content)
    with pytest.raises(StoreError):
        store.checkpoint(MODEL, PARTITION)
    shutil.rmtree(str(store.root))


def find(dataset: str, tmp_path: Path, **places: Path | None) -> Callable[[], object]:
    return lambda: sources.locate(
        dataset,
        **{"data_dir": None, "sample_dir": tmp_path, **places},
        cache_dir=tmp_path / "downloads",
        log=lambda line: None,
        download=False,
    )


@pytest.mark.parametrize("case", ENVIRONMENT, ids=lambda case: f"{case.name}: {case.what}")
def test_a_wrong_environment_is_named(
    case: BadEnvironment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(case.name, case.value)
    place = Path(case.value)
    ask = {
        "LLMREC_TIMEZONE": ticks.timezone,
        "LLMREC_ALERT_WEBHOOK": alerts.webhook,
        "LLMREC_DATA_DIR": find("ml-100k", tmp_path, data_dir=place),
        "LLMREC_SAMPLE_DIR": find("sample", tmp_path, sample_dir=place),
    }[case.name]
    with pytest.raises(LlmrecError) as refused:
        ask()
    assert case.said in str(refused.value)
    assert "T0p" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
