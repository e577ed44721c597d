"""The public graph, pinned: a change to it is seen in review."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import pytest

from llmrec_assets.definitions import build_defs
from llmrec_assets.ground.recipes import load_recipe, recipe_names
from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.orchestration.config import RunConfig
from llmrec_assets.orchestration.resources import GPU_POOL, StoreResource
from llmrec_assets.runs import CONFIGURABLE

if TYPE_CHECKING:
    from conftest import Home

PROJECT = Path(__file__).resolve().parents[2]
HEAVY = [
    *("torch", "transformers", "peft", "trl", "datasets", "lenskit"),
    *("pandas", "duckdb", "rapidfuzz", "matplotlib", "requests"),
]

STAGES = ("base", "sft", "dpo", "rlhf")
RECOMMENDATIONS = {f"{stage}_recommendations" for stage in (*STAGES, "baseline")}
TRAIN_ONLY = "trained_on_training_users_only"
OWN = "answered_by_its_own_checkpoint"
PROPOSED = "candidates_of_training_users_only"
CURRENT = "answers_of_the_current_checkpoint"
SURVIVES = "catalogue_survives_parsing"
CONTRACT = "keeps_the_contract"
TRAININGS = {"dpo_checkpoint", "reward_model", "rlhf_checkpoint"}
GROUNDED = {"prompts", "ratings", "catalogue"}

# asset: (group, partition, upstream, pool, IO manager, blocking checks)
GRAPH = {
    "movielens_files": ("source", "dataset", set(), None, "directory_io", set()),
    "movies": ("source", "dataset", {"movielens_files"}, None, "table_io", set()),
    "users": ("source", "dataset", {"movielens_files"}, None, "table_io", set()),
    "incoming_ratings": ("source", "dataset", {"users", "movies"}, None, "table_io", set()),
    "ratings": (
        "source",
        "dataset",
        {"movielens_files", "users", "movies", "incoming_ratings"},
        None,
        "table_io",
        set(),
    ),
    "user_splits": (
        "prompts",
        "dataset|recipe",
        {"users"},
        None,
        "table_io",
        {"no_user_in_two_splits"},
    ),
    "catalogue": (
        "prompts",
        "dataset|recipe",
        {"movies"},
        None,
        "table_io",
        {"titles_are_as_the_recipe_says"},
    ),
    "interaction_windows": (
        "prompts",
        "dataset|recipe",
        {"ratings", "movies", "user_splits"},
        None,
        "table_io",
        {"no_leak"},
    ),
    "prompts": (
        "prompts",
        "dataset|recipe",
        {"interaction_windows", "users", "movies", "catalogue"},
        None,
        "table_io",
        {"prompts_show_their_windows_only", "no_real_title_in_anonymised_prompts"},
    ),
    "base_model": ("models", "recipe", set(), None, "directory_io", set()),
    "sft_checkpoint": (
        "models",
        "dataset|recipe",
        {"prompts", "user_splits", "base_model"},
        "gpu",
        "directory_io",
        {TRAIN_ONLY},
    ),
    "sampled_responses": (
        "preferences",
        "dataset|recipe",
        {"prompts", "base_model", "sft_checkpoint"},
        "gpu",
        "table_io",
        set(),
    ),
    "preference_pairs": (
        "preferences",
        "dataset|recipe",
        {"sampled_responses", "prompts", "user_splits", "sft_checkpoint", *GROUNDED},
        None,
        "table_io",
        {"pairs_keep_the_split"},
    ),
    "dpo_checkpoint": (
        "models",
        "dataset|recipe",
        {"prompts", "preference_pairs", "user_splits", "base_model", "sft_checkpoint"},
        "gpu",
        "directory_io",
        {TRAIN_ONLY},
    ),
    "reward_model": (
        "models",
        "dataset|recipe",
        {"prompts", "preference_pairs", "user_splits", "base_model", "sft_checkpoint"},
        "gpu",
        "directory_io",
        {TRAIN_ONLY},
    ),
    "rlhf_checkpoint": (
        "models",
        "dataset|recipe",
        {"prompts", "user_splits", "base_model", "sft_checkpoint", "reward_model", *GROUNDED},
        "gpu",
        "directory_io",
        {TRAIN_ONLY},
    ),
    "base_responses": (
        "recommendations",
        "dataset|recipe",
        {*GROUNDED, "user_splits", "base_model"},
        "gpu",
        "table_io",
        {OWN, PROPOSED},
    ),
    "sft_responses": (
        "recommendations",
        "dataset|recipe",
        {*GROUNDED, "user_splits", "base_model", "sft_checkpoint"},
        "gpu",
        "table_io",
        {OWN, PROPOSED},
    ),
    "dpo_responses": (
        "recommendations",
        "dataset|recipe",
        {*GROUNDED, "user_splits", "base_model", "sft_checkpoint", "dpo_checkpoint"},
        "gpu",
        "table_io",
        {OWN, PROPOSED},
    ),
    "rlhf_responses": (
        "recommendations",
        "dataset|recipe",
        {*GROUNDED, "user_splits", "base_model", "sft_checkpoint", "rlhf_checkpoint"},
        "gpu",
        "table_io",
        {OWN, PROPOSED},
    ),
    "base_recommendations": (
        "recommendations",
        "dataset|recipe",
        {"base_responses", *GROUNDED},
        None,
        "table_io",
        {CURRENT, SURVIVES, CONTRACT},
    ),
    "sft_recommendations": (
        "recommendations",
        "dataset|recipe",
        {"sft_responses", *GROUNDED},
        None,
        "table_io",
        {CURRENT, SURVIVES, CONTRACT},
    ),
    "dpo_recommendations": (
        "recommendations",
        "dataset|recipe",
        {"dpo_responses", *GROUNDED},
        None,
        "table_io",
        {CURRENT, SURVIVES, CONTRACT},
    ),
    "rlhf_recommendations": (
        "recommendations",
        "dataset|recipe",
        {"rlhf_responses", *GROUNDED},
        None,
        "table_io",
        {CURRENT, SURVIVES, CONTRACT},
    ),
    "baseline_recommendations": (
        "recommendations",
        "dataset|recipe",
        {"prompts", "user_splits", "ratings", "catalogue"},
        None,
        "table_io",
        {"keeps_the_contract", "fitted_on_training_users_only"},
    ),
    "user_metrics": (
        "evaluation",
        "dataset|recipe",
        {"prompts", "ratings", "movies", *RECOMMENDATIONS},
        None,
        "table_io",
        {"scores_hold"},
    ),
    "comparisons": (
        "evaluation",
        "dataset|recipe",
        {"prompts", "user_metrics"},
        None,
        "table_io",
        set(),
    ),
    "group_metrics": (
        "evaluation",
        "dataset|recipe",
        {
            "prompts",
            "interaction_windows",
            "user_splits",
            "users",
            "ratings",
            "movies",
            "user_metrics",
        },
        None,
        "table_io",
        set(),
    ),
    "beyond_accuracy": (
        "evaluation",
        "dataset|recipe",
        {
            *("prompts", "user_splits", "ratings", "movies"),
            *RECOMMENDATIONS,
            *(f"{stage}_responses" for stage in STAGES),
        },
        None,
        "table_io",
        set(),
    ),
    "metric_table": (
        "evaluation",
        "dataset|recipe",
        {"prompts", "user_metrics", "comparisons"},
        None,
        "table_io",
        set(),
    ),
    "sample_recommendations": (
        "evaluation",
        "dataset|recipe",
        {"prompts", "interaction_windows", "catalogue", *RECOMMENDATIONS},
        None,
        "table_io",
        set(),
    ),
    "memorisation": (
        "evaluation",
        "dataset|recipe",
        {"movielens_files", "base_model"},
        "gpu",
        "table_io",
        set(),
    ),
    "leave_last_out": (
        "evaluation",
        "dataset|recipe",
        {"ratings", "movies"},
        None,
        "table_io",
        set(),
    ),
    **dict.fromkeys(
        ("champion", "promotions"),
        (
            "champion",
            "dataset",
            {
                *("ratings", "users", "movies", "prompts", "interaction_windows", "user_splits"),
                *("catalogue", "preference_pairs", "sft_checkpoint", "metric_table", *TRAININGS),
            },
            None,
            "directory_io",
            {"challenger_keeps_every_check"},
        ),
    ),
    "report": (
        "evaluation",
        "dataset|recipe",
        {
            "prompts",
            "metric_table",
            "comparisons",
            "beyond_accuracy",
            "group_metrics",
            "sample_recommendations",
            "preference_pairs",
            "memorisation",
            "leave_last_out",
            "sft_checkpoint",
            *TRAININGS,
        },
        None,
        "directory_io",
        set(),
    ),
}
GRAPH["promotions"] = (*GRAPH["promotions"][:4], "table_io", set())
#: The checks that warn: a bad reward model or rating file is told, and stops nothing.
WARNINGS = {
    "reward_model": {"ranks_validation_pairs"},
    "incoming_ratings": {"nothing_quarantined"},
}


@pytest.fixture(scope="module")
def graph() -> dg.AssetGraph:
    return build_defs().resolve_asset_graph()


def _shape(partitions: dg.PartitionsDefinition | None) -> str:
    if isinstance(partitions, dg.MultiPartitionsDefinition):
        return "|".join(sorted(d.name for d in partitions.partitions_defs))
    keys = set(partitions.get_partition_keys()) if partitions else set()
    known = {
        "dataset": {"sample", "ml-100k", "ml-1m"},
        "recipe": set(recipe_names()),
    }
    return next((name for name, expected in known.items() if keys == expected), f"{keys}")


def test_the_public_graph_is_the_declared_one(graph: dg.AssetGraph) -> None:
    found = {}
    for node in graph.asset_nodes:
        definition = node.assets_def
        own = [spec for spec in definition.check_specs if spec.asset_key == node.key]
        found[node.key.to_user_string()] = (
            node.group_name,
            _shape(node.partitions_def),
            {key.to_user_string() for key in node.parent_keys},
            definition.op.pool,
            definition.get_io_manager_key_for_asset_key(node.key),
            {spec.name for spec in own if spec.blocking},
        )
        warning = {spec.name for spec in own if not spec.blocking}
        assert warning == WARNINGS.get(node.key.to_user_string(), set())
    assert found == GRAPH


def test_no_asset_falls_back_to_the_pickling_io_manager() -> None:
    defs = build_defs()
    assert "io_manager" not in defs.resources
    assert {entry[4] for entry in GRAPH.values()} <= set(defs.resources)


def test_every_asset_says_what_it_is_whose_and_how_it_is_kept(graph: dg.AssetGraph) -> None:
    for node in graph.asset_nodes:
        name = node.key.to_user_string()
        assert node.description and len(node.description) > 20, name
        assert node.owners, name
        assert node.kinds, name
        assert node.code_version, name
        if name in SCHEMAS:
            shown = node.metadata["dagster/column_schema"]
            assert [c.name for c in shown.columns] == SCHEMAS[name].names
            assert all(c.description for c in shown.columns), name
            nullable = {c.name for c in shown.columns if c.constraints.nullable}
            assert nullable == {f.name for f in SCHEMAS[name] if f.nullable}
    assert {n for n, entry in GRAPH.items() if entry[4] == "table_io"} == set(SCHEMAS)


def test_whatever_takes_run_config_takes_the_override_of_the_command_line(
    graph: dg.AssetGraph,
) -> None:
    def takes_run_config(node: object) -> bool:
        fields = getattr(node.assets_def.op.config_schema.config_type, "fields", {})
        return set(fields) == set(RunConfig.model_fields)

    takers = {node.key.to_user_string() for node in graph.asset_nodes if takes_run_config(node)}
    assert takers == CONFIGURABLE


def test_the_jobs_cover_every_asset_once(graph: dg.AssetGraph) -> None:
    defs = build_defs()
    jobs = ["source_data", "prepare_base_model", "recommender", "promotion"]
    covered = [
        key.to_user_string()
        for job in jobs
        for key in defs.resolve_job_def(job).asset_layer.executable_asset_keys
    ]
    assert sorted(covered) == sorted(GRAPH)


def test_the_supervised_job_stops_where_the_paper_stops_on_ml_1m() -> None:
    keys = build_defs().resolve_job_def("supervised").asset_layer.executable_asset_keys
    left_out = set(GRAPH) - {key.to_user_string() for key in keys}
    assert left_out == {
        *(name for name, entry in GRAPH.items() if entry[0] in ("source", "champion")),
        *("base_model", "sampled_responses", "preference_pairs"),
        *TRAININGS,
        *("dpo_responses", "rlhf_responses", "dpo_recommendations", "rlhf_recommendations"),
    }
    for recipe in ("cpu", "paper"):
        assert "ml-1m" not in load_recipe(recipe).aligned_datasets


def test_titles_reach_models_and_lists_through_the_catalogue_alone(graph: dg.AssetGraph) -> None:
    """Whoever read `movies` past it would show real titles under an anonymised recipe.
    `prompts` holds its text against them; the others named here read ids, years and genres."""
    readers = {
        node.key.to_user_string()
        for node in graph.asset_nodes
        if dg.AssetKey("movies") in node.parent_keys
    }
    assert readers == {
        *("incoming_ratings", "ratings", "interaction_windows", "catalogue", "prompts"),
        "user_metrics",
        *("beyond_accuracy", "group_metrics", "leave_last_out"),
        *("champion", "promotions"),
    }


def test_the_evaluation_job_needs_no_model_and_refits_nothing() -> None:
    keys = build_defs().resolve_job_def("evaluation").asset_layer.executable_asset_keys
    names = {key.to_user_string() for key in keys}
    evaluated = {name for name, entry in GRAPH.items() if entry[0] == "evaluation"}
    assert names == {
        *(evaluated - {"memorisation", "leave_last_out"}),
        *(f"{stage}_recommendations" for stage in STAGES),
    }
    assert not {name for name in names if GRAPH[name][3] == GPU_POOL}


def test_the_settings_give_the_gpu_pool_one_place() -> None:
    import yaml

    settings = yaml.safe_load((PROJECT / "dagster.yaml").read_text())
    assert settings["concurrency"]["pools"] == {"default_limit": 1, "granularity": "op"}
    assert settings["concurrency"]["runs"] == {"max_concurrent_runs": 4}
    assert settings["run_monitoring"]["enabled"] is True
    assert settings["run_monitoring"]["free_slots_after_run_end_seconds"] <= 60
    assert {n for n, entry in GRAPH.items() if entry[3] == GPU_POOL} == {
        "sft_checkpoint",
        "sampled_responses",
        "memorisation",
        *TRAININGS,
        *(f"{stage}_responses" for stage in STAGES),
    }


def test_another_store_replaces_the_one_of_the_io_managers_too(tmp_path: Path) -> None:
    other = StoreResource(location=str(tmp_path / "elsewhere"))
    defs = build_defs(resource_overrides={"storage": other})
    assert defs.resources["storage"] is other
    dg.Definitions.validate_loadable(defs)
    job = defs.resolve_job_def("source_data")
    table_io = job.resource_defs["table_io"]
    with dg.build_resources({"table_io": defs.resources["table_io"]}) as built:
        assert Path(str(built.table_io.storage.store().root)) == tmp_path / "elsewhere"
    assert table_io is not None


def test_loading_the_definitions_imports_nothing_that_only_assets_need() -> None:
    script = (
        "import json, sys; import llmrec_assets.definitions; "
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PROJECT, check=True
    )
    assert json.loads(done.stdout) == []


#: Put on PYTHONPATH as ``sitecustomize``: notes imports in every process, code servers included.
WATCH_IMPORTS = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        with open(os.environ["IMPORTS_SEEN"], "a") as seen:
            print(name, file=seen)

sys.meta_path.insert(0, Watch())
"""


def test_dagster_validates_the_workspace_in_a_bearable_time_without_torch(
    new_home: Callable[..., Home], tmp_path: Path
) -> None:
    home = new_home()
    home.instance().dispose()
    (tmp_path / "sitecustomize.py").write_text(WATCH_IMPORTS)
    seen = tmp_path / "seen"
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml"],
        env=home.environment(PYTHONPATH=str(tmp_path), IMPORTS_SEEN=str(seen)),
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    seconds = time.monotonic() - started
    print(f"dagster definitions validate: {seconds:.1f} s")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Validation successful for code location llmrec_assets" in done.stdout + done.stderr
    imported = set(seen.read_text().split())
    assert "llmrec_assets.orchestration.assets" in imported
    assert not imported & set(HEAVY)
    assert seconds < 15  # a few on a quiet machine: catches torch at the top of a module, no more
