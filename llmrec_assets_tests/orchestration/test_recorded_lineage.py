"""The lineage of a run: every step's record against what it declares, and the command that reads
it."""

from __future__ import annotations

import inspect
import json
import platform
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import dagster as dg
import pytest

from llmrec_assets.definitions import build_defs
from llmrec_assets.ground.column_lineage import expanded, sources
from llmrec_assets.ground.lineage import RECIPE_PARTS, Lineage, stale, trace
from llmrec_assets.ground.provenance import CODE_VERSION, read_provenance
from llmrec_assets.ground.recipes import load_recipe
from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.runs import CONFIGURABLE

if TYPE_CHECKING:
    from conftest import FinishedRun, Home

PARTITION = "sample|tiny"
#: No run of a recipe makes them: a decision does.
DECIDED = {"champion", "promotions"}


@pytest.fixture(scope="module")
def parents() -> dict[str, set[str]]:
    """Asset → the assets it declares to be made from."""
    return {
        node.key.to_user_string(): {key.to_user_string() for key in node.parent_keys}
        for node in build_defs().resolve_asset_graph().asset_nodes
        if node.key.to_user_string() not in DECIDED
    }


def partition_of(asset: str) -> str:
    if not RECIPE_PARTS[asset]:
        return "sample"
    return "tiny" if asset == "base_model" else PARTITION


def lineage_of(home: Home, asset: str) -> Lineage:
    return trace(home.store, asset, partition_of(asset))


def test_every_step_records_the_versions_it_declares_to_read(
    finished: FinishedRun, parents: dict[str, set[str]]
) -> None:
    store = finished.home.store
    assert set(parents) | DECIDED == set(RECIPE_PARTS)
    for asset, declared in parents.items():
        found = lineage_of(finished.home, asset)
        read = {key[0]: key for key in found.nodes[found.root].inputs}
        beside = {"sampled_responses"} if asset == "report" else set()
        assert set(read) == declared | beside, asset
        for name, key in read.items():
            kind = "tables" if name in SCHEMAS else "checkpoints"
            partition = partition_of(name)
            assert key == (name, partition, store.current(name, partition, kind)), asset


def test_every_record_is_whole(finished: FinishedRun, parents: dict[str, set[str]]) -> None:
    recipe = load_recipe("tiny")
    for asset in parents:
        root = lineage_of(finished.home, asset).root
        made = read_provenance(finished.home.store, *root)
        assert made is not None
        assert made.run_id in finished.run_ids and made.code == CODE_VERSION
        assert made.seed == (recipe.seed if asset in CONFIGURABLE else None), asset
        of_data = partition_of(asset) == "sample"
        assert made.recipe == (None if of_data else recipe.model_dump(mode="json")), asset
        assert made.libraries and made.libraries["trl"].startswith("1.")
        assert made.machine and made.machine["cpu"] and made.machine["gpu"] is None
        text = json.dumps(made.to_json())
        assert platform.node() not in text and str(finished.home.root) not in text
    trained = read_provenance(
        finished.home.store, *lineage_of(finished.home, "sft_checkpoint").root
    )
    assert trained and trained.machine and trained.machine["threads"] == 1


def test_a_finished_run_rests_on_the_rating_files_and_nothing_is_stale(
    finished: FinishedRun, parents: dict[str, set[str]]
) -> None:
    found = lineage_of(finished.home, "metric_table")
    names = [key[0] for key in found.nodes]
    assert len(set(names)) == len(names)
    evaluated = {"metric_table", "user_metrics", "comparisons"}
    beside = {name for name in parents if parents[name] & evaluated} - evaluated
    others = {"beyond_accuracy", "sample_recommendations", "leave_last_out", "memorisation"}
    assert set(names) == set(parents) - beside - others
    assert stale(finished.home.store, found) == {}


def test_the_command_prints_the_tree_of_a_row_and_all_of_it_as_json(finished: FinishedRun) -> None:
    home = finished.home
    done = home.llmrec("lineage", "--recipe", "tiny", "--stage", "sft", "--decoding", "free")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"sample | tiny: metric_table {home.current()['metric_table']}"
    assert lines[1].startswith("  sft, free, prompt: NDCG@5 ") and "users" in lines[1]
    current = {**home.current(), **home.current(kind="checkpoints")}
    for asset in ("sft_checkpoint", "prompts", "interaction_windows"):
        told = f"─ {asset} {current[asset]}  [1] run {finished.run_ids[-1][:8]}, "
        assert sum(told in line for line in lines) == 1, asset
    assert "dpo_checkpoint" not in done.stdout
    assert "u.data sha256 " in done.stdout
    assert all(run_id in done.stdout for run_id in finished.run_ids)
    assert lines[-1] == "nothing of it is stale"
    told = json.loads(home.llmrec("lineage", "--recipe", "tiny", "--json").stdout)
    assert len(told["rows"]) == 29
    assert {"preference_pairs", "rlhf_checkpoint", "movielens_files"} <= {
        node["asset"] for node in told["nodes"]
    }


def test_the_command_refuses_what_is_not_there(finished: FinishedRun) -> None:
    for options, said in (
        (("--recipe", "cpu"), "metric_table has not been materialized for sample|cpu"),
        (("--recipe", "tiny", "--stage", "grpo"), "no row grpo"),
        (("--recipe", "tiny", "--version", "0" * 16), "is not kept any more; kept versions: "),
    ):
        done = finished.home.llmrec("lineage", *options)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert said in line


def test_a_step_made_again_is_stale_to_what_rests_on_it_only_with_other_content(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = copied
    before = home.current()
    drawn = ("user_splits", "interaction_windows")
    own = load_recipe("tiny").seed
    assert home.materialize(instance, *drawn, config={"seed": own}).success
    assert home.current() == before
    assert stale(home.store, lineage_of(home, "metric_table")) == {}
    assert home.materialize(instance, *drawn, config={"seed": 2}).success
    now = home.current()
    told = stale(home.store, lineage_of(home, "metric_table"))
    assert {key[0]: problems for key, problems in told.items()} == {
        name: [f"replaced: the version in force is {now[name]}"] for name in drawn
    }
    made = read_provenance(home.store, "user_splits", PARTITION, now["user_splits"])
    assert made and made.seed == 2
    done = home.llmrec("lineage", "--recipe", "tiny", "--version", before["metric_table"])
    assert done.returncode == 0
    assert f"  user_splits {before['user_splits']}: replaced" in done.stdout


def test_reused_samples_keep_the_record_of_the_run_that_drew_them(
    copied: tuple[Home, dg.DagsterInstance], finished: FinishedRun
) -> None:
    home, instance = copied
    root = lineage_of(home, "sampled_responses").root
    before = read_provenance(home.store, *root)
    result = home.materialize(instance, "sampled_responses")
    assert result.success
    assert read_provenance(home.store, *root) == before
    assert before and before.run_id in finished.run_ids and before.run_id != result.run_id


def test_a_reused_checkpoint_links_to_the_run_that_trained_it(
    copied: tuple[Home, dg.DagsterInstance], finished: FinishedRun
) -> None:
    home, instance = copied
    result = home.materialize(instance, "sft_checkpoint")
    (event,) = result.asset_materializations_for_node("sft_checkpoint")
    assert event.metadata["reused"].value is True
    assert event.metadata["made_in_run"].value == finished.run_ids[-1]


def test_column_lineage_stays_within_what_an_asset_declares_to_read(
    parents: dict[str, set[str]],
) -> None:
    for asset in sorted(set(SCHEMAS) - DECIDED):
        named = {table for made_from in sources(asset).values() for table, _ in expanded(made_from)}
        assert named <= parents[asset], asset


#: Read for the metadata, or handed on whole.
NOT_JUDGED = {
    "metric_table": {"base_model.label"},
    "memorisation": {"base_model.label"},
    "sft_checkpoint": {"expected_peak_memory_gb"},
}


def test_recipe_parts_are_what_the_assets_read() -> None:
    """By the source of each asset and of the helpers of its module that it calls."""
    for node in build_defs().resolve_asset_graph().asset_nodes:
        asset = node.key.to_user_string()
        if asset in {"baseline_recommendations", *DECIDED}:
            continue  # hands the recipe on whole; `classical_lists` says which sections it reads
        read = parts_read(node.assets_def.op.compute_fn.decorated_fn)
        read -= NOT_JUDGED.get(asset, set())
        # `ease_candidates` takes the recipe whole.
        handed_on = {"baselines.ease"} if asset.endswith("_responses") else set()
        parts = set(RECIPE_PARTS[asset]) - handed_on
        assert not [name for name in read if not any(akin(name, part) for part in parts)], asset
        assert not [part for part in parts if not any(akin(name, part) for name in read)], asset


def parts_read(body: Callable) -> set[str]:
    """``windows.top_k`` for ``recipe.windows.top_k``, ``sft`` for ``recipe.sft`` handed on."""
    source = inspect.getsource(body)
    for name, helper in vars(inspect.getmodule(body)).items():
        own = inspect.isfunction(helper) and helper.__module__ == body.__module__
        if own and re.search(rf"\b{name}\(", source):
            source += inspect.getsource(helper)
    found = re.findall(r"\brecipe(?:_of\(context\))?\.(\w+)(?:\.(?!model_dump)(\w+))?", source)
    if "recipe_of(context).base_model" in source:  # its `recipe` is that section
        found = [("base_model", "")]
    return {".".join(filter(None, names)) for names in found if names[0] != "name"}


def akin(one: str, other: str) -> bool:
    """Whether one is the other or a part of it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
