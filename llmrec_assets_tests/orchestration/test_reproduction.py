"""A result is made again from its record: the same bits on a CPU."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pandas as pd
import pytest
import yaml

from llmrec_assets import reproduction
from llmrec_assets.ground.errors import LlmrecError, StoreError
from llmrec_assets.ground.lineage import Lineage, trace
from llmrec_assets.ground.provenance import read_provenance
from llmrec_assets.ground.recipes import load_recipe
from llmrec_assets.reproduction import differing_rows, recorded, reproduce, within_intervals

if TYPE_CHECKING:
    from conftest import FinishedRun, Home

PARTITION = "sample|tiny"


@pytest.mark.timeout(1500)  # a whole tiny run: half a minute of CPU, however long that takes
def test_a_result_is_reproduced_bit_for_bit_from_its_record_alone(
    copied: tuple[Home, dg.DagsterInstance], tmp_path: Path
) -> None:
    """Although the recipe's file, the sample and the number of threads are others today."""
    home, _ = copied
    recipe = load_recipe("tiny").model_dump(mode="json")
    recipe["sft"]["learning_rate"] = 0.5
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    done = home.llmrec(
        "reproduce",
        "--recipe",
        "tiny",
        LLMREC_RECIPES_DIR=str(tmp_path),
        LLMREC_SAMPLE_DIR=str(tmp_path),
        OMP_NUM_THREADS="2",
        timeout=1400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    version = home.current()["metric_table"]
    assert done.stdout.splitlines() == [
        f"metric_table {version}, made again (seed 1, 1 threads): all 29 rows are equal, "
        "bit for bit"
    ]
    assert "published sft_checkpoint" in done.stderr, "trained, not reused"
    assert not list((home.location / "reproductions").rglob("*.parquet"))


@pytest.fixture
def table(finished: FinishedRun) -> pd.DataFrame:
    return finished.home.store.read_table("metric_table", PARTITION).frame.copy()


def test_one_changed_bit_is_told_with_its_row_and_column(table: pd.DataFrame) -> None:
    assert differing_rows(table, table.copy()) == []
    other = table.copy()
    popularity = other["stage"] == "popularity"
    row = other.index[popularity][0]
    value = float(other.loc[row, "recall"])
    other.loc[row, "recall"] = value * (1 + 2**-50)
    (line,) = differing_rows(table, other)
    assert line.startswith("popularity, ranking, history: recall ")
    assert differing_rows(table, table.assign(checkpoint_version="v-2")) == []


def test_rows_that_only_one_side_has_are_told(table: pd.DataFrame) -> None:
    assert differing_rows(table, table.iloc[1:]) == [
        "base, constrained, prompt: only in the recorded table"
    ]
    assert differing_rows(table.iloc[1:], table) == [
        "base, constrained, prompt: only in the new table"
    ]


def test_a_gpu_is_held_to_the_recorded_intervals(table: pd.DataFrame) -> None:
    other = table.copy()
    other["ndcg"] = other["ndcg_high"]
    assert within_intervals(table, other)
    other["ndcg"] = other["ndcg_high"] + 1e-9
    assert not within_intervals(table, other)
    assert not within_intervals(table, table.iloc[1:])


def with_changed(lineage: Lineage, asset: str, **changes: Any) -> Lineage:
    """A lineage whose record of one asset says otherwise."""
    nodes = dict(lineage.nodes)
    (key,) = [key for key in nodes if key[0] == asset]
    made = nodes[key].provenance
    assert made is not None
    provenance = replace(made, **changes) if changes else None
    nodes[key] = replace(nodes[key], provenance=provenance)
    return Lineage(lineage.root, nodes)


def test_what_no_single_run_makes_again_is_refused_with_the_reason(finished: FinishedRun) -> None:
    store = finished.home.store
    lineage = trace(store, "metric_table", PARTITION)
    given = recorded(store, lineage)
    assert (given.seed, given.threads, given.on_gpu) == (1, 1, False)
    assert (given.files / "u.data").is_file()
    recipe = load_recipe("tiny").model_dump(mode="json")
    recipe["sft"]["epochs"] = 3.0
    for asset, changes, said in (
        ("metric_table", {}, "published before there were records"),
        ("sft_checkpoint", {"recipe": recipe}, r"\(sft of sft_checkpoint differ\)"),
        ("user_splits", {"seed": 2}, r"different seeds \(1, 2\)"),
        ("sft_responses", {"machine": {"threads": 8}}, r"different numbers of threads \(1, 8\)"),
    ):
        with pytest.raises(StoreError, match=said):
            recorded(store, with_changed(lineage, asset, **changes))
    other = {**recipe, "sft": load_recipe("tiny").sft.model_dump(mode="json")}
    other["probes"] = {**other["probes"], "n": 9}
    edited_elsewhere = with_changed(lineage, "sft_checkpoint", recipe=other)
    assert recorded(store, edited_elsewhere).recipe == given.recipe, "no part of it rests on that"
    on_gpu = with_changed(lineage, "sft_responses", machine={"threads": 1, "gpu": "a card"})
    assert recorded(store, on_gpu).on_gpu


def test_a_result_that_is_not_reproduced_is_kept_beside_and_the_next_attempt_begins_anew(
    copied: tuple[Home, dg.DagsterInstance], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _ = copied
    store, version = home.store, home.current()["metric_table"]
    record = read_provenance(store, "metric_table", PARTITION, version)
    assert record is not None
    table = store.read_table("metric_table", PARTITION).frame
    found: list[Path] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        there = Path(env["LLMREC_HOME"])
        assert not (there / "tables").exists(), "begun anew"
        assert env["OMP_NUM_THREADS"] == "1" and env["LLMREC_DEVICE"] == "cpu"
        assert command[-2:] == ["--seed", "1"]
        found.append(there)
        home_of_it = type(store).at(there)
        home_of_it.publish_table("metric_table", PARTITION, table.assign(hits=table["hits"] + 1))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        with pytest.raises(LlmrecError, match=f"metric_table {version} is not reproduced") as error:
            reproduce(store, "sample", "tiny")
        assert "popularity, ranking, history: hits" in str(error.value)
        assert found[-1].is_dir()
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1)
    )
    with pytest.raises(LlmrecError, match="the reproduction failed"):
        reproduce(store, "sample", "tiny")


def test_a_result_that_stops_at_sft_is_made_again_up_to_sft(
    copied: tuple[Home, dg.DagsterInstance], tmp_path: Path
) -> None:
    home, _ = copied
    given = recorded(home.store, trace(home.store, "metric_table", PARTITION))
    table = home.store.read_table("metric_table", PARTITION).frame
    for rows, aligned in ((table, ["sample", "ml-100k"]), (table[table["stage"] == "sft"], [])):
        reproduction._write_recipe(given, rows, tmp_path / "tiny.yaml")
        written = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
        assert written["aligned_datasets"] == aligned
        assert {**written, "aligned_datasets": None} == {**given.recipe, "aligned_datasets": None}
