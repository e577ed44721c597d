"""From a metric table back to the files, and everything that can be stale on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from llmrec_assets.ground import lineage as lineage_module
from llmrec_assets.ground.errors import DataError, StoreError
from llmrec_assets.ground.lineage import RECIPE_PARTS, stale, trace
from llmrec_assets.ground.lineage_page import chosen_rows, lineage_json, lineage_text
from llmrec_assets.ground.provenance import CODE_VERSION, Input, Provenance
from llmrec_assets.ground.recipes import Recipe, load_recipe
from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.ground.stages import STAGES_OF_TABLE
from llmrec_assets.ground.store import Store, checkpoint_version

PARTITION = "sample|tiny"
TINY = load_recipe("tiny")
_OF_TYPE = {"string": "", "bool": False, "float": 0.0, "double": 0.0}


def row(asset: str, **values: Any) -> pd.DataFrame:
    """One row of ``asset`` with ``values``, the other columns empty or zero."""

    def default(type_: pa.DataType) -> Any:
        return [] if pa.types.is_list(type_) else _OF_TYPE.get(str(type_), 0)

    filled = {
        field.name: [values.get(field.name, None if field.nullable else default(field.type))]
        for field in SCHEMAS[asset]
    }
    return pd.DataFrame(filled)


class Chain:
    """A store with a metric table of two stages and all it was made of, one row a table."""

    def __init__(self, home: Path, *, recorded: bool = True) -> None:
        self.store, self.recorded = Store.at(home), recorded
        self.versions: dict[str, str] = {}
        files = self.checkpoint("movielens_files", "sample", {})
        assert files
        self.table("users", "sample", ["movielens_files"], gender="F", occupation="", zip_code="")
        self.table("ratings", "sample", ["movielens_files", "users"], rating=5)
        self.checkpoint("base_model", "tiny", {"recipe": TINY.base_model.model_dump()})
        self.prompts()
        self.checkpoint(
            "sft_checkpoint",
            PARTITION,
            {
                "prompts": self.versions["prompts"],
                "base_model": self.versions["base_model"],
                "recipe": TINY.sft.model_dump(),
                "seed": TINY.seed,
            },
        )
        for stage, asset in (("base", "base_model"), ("sft", "sft_checkpoint")):
            answered = {
                "stage": stage,
                "decoding": "free",
                "prompts_version": self.versions["prompts"],
                "checkpoint_version": self.versions[asset],
            }
            self.table(f"{stage}_responses", PARTITION, ["prompts", asset], **answered)
            read = [f"{stage}_responses", "prompts", "ratings"]
            self.table(f"{stage}_recommendations", PARTITION, read, **answered)
        lists = ["base_recommendations", "sft_recommendations"]
        self.frames("user_metrics", ["prompts", *lists])
        self.frames("metric_table", ["user_metrics", "prompts"], ndcg=0.25, k=5, hits=3)

    def prompts(self, seed: int = TINY.seed, text: str = "Recommend.") -> None:
        self.table("user_splits", PARTITION, ["users"], split="test", seed=seed)
        self.table("prompts", PARTITION, ["user_splits"], prompt=text)

    def frames(self, asset: str, read: list[str], **values: Any) -> None:
        rows = [
            row(
                asset,
                stage=stage,
                decoding="free",
                information_set="prompt",
                prompts_version=self.versions["prompts"],
                recommendations_version=self.versions[f"{stage}_recommendations"],
                checkpoint_version=self.versions[policy],
                **values,
            )
            for stage, policy in (("base", "base_model"), ("sft", "sft_checkpoint"))
        ]
        self._publish(asset, PARTITION, read, pd.concat(rows, ignore_index=True))

    def table(
        self, asset: str, partition: str, read: list[str], seed: int = TINY.seed, **values: Any
    ) -> None:
        self._publish(asset, partition, read, row(asset, **values), seed)

    def _publish(
        self, asset: str, partition: str, read: list[str], frame: pd.DataFrame, seed: int = 1
    ) -> None:
        made = self.record(read, seed).to_json() if self.recorded else None
        self.versions[asset] = self.store.publish_table(asset, partition, frame, made)

    def checkpoint(self, asset: str, partition: str, determinants: dict[str, Any]) -> Path:
        determinants = {**determinants, "code": CODE_VERSION}
        version = checkpoint_version(asset, determinants)
        work = self.store.work_directory(asset, partition, version)
        (work / "u.data").write_text("1\t1\t5\t0\n")
        read = [name for name in determinants if name in self.versions]
        path = self.store.publish_checkpoint(
            asset,
            partition,
            version,
            work,
            determinants=determinants,
            facts={"run_id": "old run"},
            provenance=self.record(read).to_json() if self.recorded else None,
        )
        self.versions[asset] = path.name
        return path

    def record(self, read: list[str], seed: int = TINY.seed) -> Provenance:
        partition_of = {"users": "sample", "ratings": "sample", "movielens_files": "sample"}
        partition_of["base_model"] = "tiny"
        return Provenance(
            {n: Input(partition_of.get(n, PARTITION), self.versions[n]) for n in read},
            run_id="a run",
            recipe=TINY.model_dump(mode="json"),
            seed=seed,
            code=CODE_VERSION,
            commit="c0ffee",
            libraries={"torch": "0.1"},
            machine={"cpu": "A CPU", "cores": 2, "threads": 1, "gpu": None},
        )

    def trace(self, **options: Any) -> Any:
        return trace(self.store, "metric_table", PARTITION, **options)

    def problems(self) -> dict[str, list[str]]:
        return {key[0]: told for key, told in stale(self.store, self.trace()).items()}


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


@pytest.fixture
def old(tmp_path: Path) -> Chain:
    """As published before there were records."""
    return Chain(tmp_path, recorded=False)


def edited(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """The recipe's file says otherwise today."""
    values = {**TINY.model_dump(), **changes}
    recipe = Recipe.model_validate(values)
    monkeypatch.setattr(lineage_module, "load_recipe", lambda name: recipe)


# -- the way back -------------------------------------------------------------------------------


def test_everything_a_table_was_made_of_is_found_once(chain):
    found = chain.trace()
    assert found.root == ("metric_table", PARTITION, chain.versions["metric_table"])
    assert {key[0]: key[2] for key in found.nodes} == chain.versions
    assert len(found.nodes) == len(chain.versions)
    assert next(iter(found.nodes)) == found.root
    files = found.nodes["movielens_files", "sample", chain.versions["movielens_files"]]
    assert list(files.files) == ["u.data"] and len(files.files["u.data"]) == 64


def test_a_stage_rests_on_its_own_lists_alone(chain):
    names = {key[0] for key in chain.trace(stage="base").nodes}
    assert names == set(chain.versions) - {
        "sft_recommendations",
        "sft_responses",
        "sft_checkpoint",
    }


def test_an_older_table_is_followed_to_what_it_was_made_of(chain):
    before = dict(chain.versions)
    chain.prompts(text="Recommend better.")
    chain.frames("metric_table", ["user_metrics", "prompts"], ndcg=0.5)
    found = chain.trace(version=before["metric_table"])
    assert {key[0]: key[2] for key in found.nodes} == before
    assert chain.trace().root[2] == chain.versions["metric_table"] != before["metric_table"]


def test_without_a_record_columns_and_determinants_are_followed(old):
    found = old.trace()
    followed = {key[0]: key[2] for key in found.nodes}
    assert followed == {
        name: old.versions[name]
        for name in (
            *("metric_table", "prompts", "base_recommendations", "sft_recommendations"),
            *("base_model", "sft_checkpoint"),
        )
    }
    assert {key[1] for key in found.nodes if key[0] == "base_model"} == {"tiny"}
    assert "base_recommendations" not in {key[0] for key in old.trace(stage="sft").nodes}
    metrics = trace(old.store, "user_metrics", PARTITION)
    assert {key[0] for key in metrics.nodes} >= {"prompts", "sft_recommendations"}


def test_what_was_never_made_or_is_not_kept_is_an_error_with_what_there_is(chain, tmp_path):
    with pytest.raises(StoreError, match=r"has not been materialized for ml-1m\|cpu"):
        trace(chain.store, "metric_table", "ml-1m|cpu")
    version = chain.versions["metric_table"]
    with pytest.raises(StoreError, match=f"not kept any more; kept versions: {version}"):
        chain.trace(version="gone")
    with pytest.raises(StoreError, match="kept versions: "):
        trace(chain.store, "sft_checkpoint", PARTITION, "gone")


# -- stale --------------------------------------------------------------------------------------


def test_nothing_is_stale_that_was_just_made(chain, old):
    assert chain.problems() == {}


def test_nothing_is_stale_for_want_of_a_record(old):
    assert old.problems() == {}


def test_a_replaced_input_is_named_with_the_version_in_force(chain):
    before = dict(chain.versions)
    chain.prompts(text="Recommend better.")
    assert chain.problems() == {
        "prompts": [f"replaced: the version in force is {chain.versions['prompts']}"]
    }
    assert before["prompts"] in {key[2] for key in chain.trace().nodes}


def test_an_input_made_again_with_the_same_content_is_not_stale(chain):
    chain.prompts()
    assert chain.problems() == {}


def test_an_edited_section_is_told_to_whom_it_concerns_alone(chain, monkeypatch):
    edited(monkeypatch, sft={**TINY.sft.model_dump(), "learning_rate": 0.5})
    assert chain.problems() == {
        "sft_checkpoint": ["recipe edited: sft.learning_rate 0.01, now 0.5"]
    }


def test_before_the_record_a_checkpoints_own_section_is_still_compared(old, monkeypatch):
    edited(monkeypatch, sft={**TINY.sft.model_dump(), "epochs": 3})
    assert old.problems() == {"sft_checkpoint": ["recipe edited: sft.epochs 1.0, now 3.0"]}


def test_single_values_of_a_section_concern_those_who_read_them(chain, monkeypatch):
    edited(monkeypatch, evaluation={**TINY.evaluation.model_dump(), "resamples": 700})
    assert chain.problems() == {
        "metric_table": ["recipe edited: evaluation.resamples 500, now 700"]
    }


def test_an_edited_seed_is_told_and_an_override_is_not(chain, monkeypatch):
    chain.prompts(seed=5)
    edited(monkeypatch, seed=TINY.seed + 1)
    told = chain.problems()
    assert told["metric_table"] == ["recipe edited: seed 1, now 2"]
    assert "user_splits" not in told, "a run had overridden its seed"


def test_a_recipe_that_is_gone_is_told(chain, monkeypatch):
    monkeypatch.setattr(lineage_module, "load_recipe", lambda name: load_recipe("gone"))
    assert (
        "its recipe cannot be read any more: no recipe named 'gone'"
        in (chain.problems()["metric_table"][0])
    )


def test_a_raised_code_version_makes_everything_stale(chain, monkeypatch):
    monkeypatch.setattr(lineage_module, "CODE_VERSION", "99")
    told = chain.problems()
    assert set(told) == set(chain.versions)
    assert told["ratings"] == [f"made by code version {CODE_VERSION}, today's is 99"]


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_a_changed_or_missing_file_of_a_checkpoint_is_named(chain, harm):
    path = chain.store.checkpoint("sft_checkpoint", PARTITION) / "u.data"
    path.write_text("1\t1\t4\t0\n") if harm == "change" else path.unlink()
    (told,) = chain.problems()["sft_checkpoint"]
    said = "does not match its manifest" if harm == "change" else "is missing"
    assert f"u.data {said}" in told


def test_a_table_whose_content_is_not_its_versions_is_told(chain):
    store, prompts = chain.store, chain.versions["prompts"]
    other = store.publish_table("prompts", "sample|paper", row("prompts", prompt="Forged."))
    forged = store.table_path("prompts", "sample|paper", other).read_bytes()
    store.table_path("prompts", PARTITION, prompts).write_bytes(forged)
    assert "content is not that of version" in chain.problems()["prompts"][0]


def test_an_input_that_is_not_kept_ends_its_branch_and_is_told(chain):
    shutil.rmtree(str(chain.store.table_path("user_splits", PARTITION, "any").parent))
    shutil.rmtree(chain.store.checkpoint_path("base_model", "tiny", "any").parent)
    told = chain.problems()
    assert "is not kept any more" in told["user_splits"][0]
    assert "is missing" in told["base_model"][0]
    assert "users" not in {key[0] for key in chain.trace().nodes if key[0] == "movielens_files"}


# -- as text and as JSON ------------------------------------------------------------------------


def shown(chain: Chain, **options: Any) -> str:
    found = chain.trace(**options)
    rows = chosen_rows(chain.store.read_table(*found.root).frame, options.get("stage"))
    return lineage_text(found, stale(chain.store, found), rows)


def test_the_text_shows_rows_tree_makers_and_files(chain):
    text = shown(chain)
    lines = text.splitlines()
    assert lines[0] == f"sample | tiny: metric_table {chain.versions['metric_table']}"
    assert lines[1] == "  base, free, prompt: NDCG@5 0.2500 [0.0000, 0.0000], 3 hits, 0 users"
    assert text.count(f"prompts {chain.versions['prompts']}  [1] run a run, seed 1, threads 1") == 1
    assert text.count(f"prompts {chain.versions['prompts']} (above)") == 6
    assert "u.data sha256 " in text
    assert f"[1] code {CODE_VERSION}, commit c0ffee; A CPU, 2 cores; GPU none; torch 0.1" in text
    assert "torch 0.1 (here 2." in text
    assert lines[-1] == "nothing of it is stale"


def test_the_text_marks_what_is_stale(chain):
    chain.prompts(text="Recommend better.")
    text = shown(chain, stage="sft")
    assert "base, free" not in text
    assert text.count("— STALE") == 5
    assert text.splitlines()[-2:] == [
        "stale",
        f"  prompts {chain.trace().nodes and _version_in(chain, 'prompts')}: replaced: the version "
        f"in force is {chain.versions['prompts']}",
    ]


def _version_in(chain: Chain, asset: str) -> str:
    (version,) = [key[2] for key in chain.trace().nodes if key[0] == asset]
    return version


def test_what_is_not_recorded_is_called_so(old):
    text = shown(old)
    assert "run, code and machine not recorded" in text
    assert "└─ made from: not recorded" in text
    assert f"[1] code {CODE_VERSION}, commit not recorded; CPU not recorded; GPU not rec" in text


def test_the_json_holds_all_that_is_recorded(chain):
    found = chain.trace()
    rows = chain.store.read_table(*found.root).frame
    told = json.loads(lineage_json(found, stale(chain.store, found), rows))
    assert [row["stage"] for row in told["rows"]] == ["base", "sft"]
    assert told["rows"][0]["versus"] is None and told["rows"][0]["ndcg"] == 0.25
    by_asset = {node["asset"]: node for node in told["nodes"]}
    assert set(by_asset) == set(chain.versions)
    sft = by_asset["sft_checkpoint"]
    assert sft["recipe"] == TINY.model_dump(mode="json")
    assert (sft["seed"], sft["code"], sft["commit"]) == (TINY.seed, CODE_VERSION, "c0ffee")
    assert f"prompts/{PARTITION}/{chain.versions['prompts']}" in sft["inputs"]
    assert sft["stale"] == []


def test_a_row_that_is_not_there_is_refused_with_those_that_are(chain):
    table = chain.store.read_table("metric_table", PARTITION).frame
    assert chosen_rows(table, "sft", "free")["stage"].tolist() == ["sft"]
    with pytest.raises(DataError, match="no row dpo free; it has: base free, sft free"):
        chosen_rows(table, "dpo", "free")


def test_recipe_parts_name_what_there_is():
    dumped = TINY.model_dump()
    for asset, parts in RECIPE_PARTS.items():
        for part in parts:
            section, _, value = part.partition(".")
            assert section in dumped, asset
            assert not value or value in dumped[section], asset
    assert set(RECIPE_PARTS) >= set(SCHEMAS) | {t for t in STAGES_OF_TABLE}
