"""``sample | tiny`` through the whole graph, and what happens when it is materialized again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest

from llmrec_assets.ground.provenance import read_provenance
from llmrec_assets.ground.recipes import load_recipe
from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.ground.stages import STAGES_OF_TABLE
from llmrec_assets.ground.store import read_manifest, verify_checkpoint
from llmrec_assets.models import sft

if TYPE_CHECKING:
    from conftest import FinishedRun, Home

PARTITION = "sample|tiny"
SOURCE = {"movielens_files", "movies", "users", "incoming_ratings", "ratings"}
STAGES = ("base", "sft", "dpo", "rlhf")
TRAININGS = ("sft_checkpoint", "dpo_checkpoint", "reward_model", "rlhf_checkpoint")
#: `promotions` comes with the champion, which a run of a recipe does not crown.
TABLES = set(SCHEMAS) - {"promotions"}
CHECKPOINTS = {"movielens_files", "base_model", *TRAININGS, "report"}
CHECKS = {
    ("user_splits", "no_user_in_two_splits"),
    ("interaction_windows", "no_leak"),
    ("catalogue", "titles_are_as_the_recipe_says"),
    ("prompts", "prompts_show_their_windows_only"),
    ("prompts", "no_real_title_in_anonymised_prompts"),
    ("incoming_ratings", "nothing_quarantined"),
    ("preference_pairs", "pairs_keep_the_split"),
    ("baseline_recommendations", "keeps_the_contract"),
    ("baseline_recommendations", "fitted_on_training_users_only"),
    ("user_metrics", "scores_hold"),
    *((asset, "trained_on_training_users_only") for asset in TRAININGS),
    *((f"{stage}_responses", "answered_by_its_own_checkpoint") for stage in STAGES),
    *((f"{stage}_responses", "candidates_of_training_users_only") for stage in STAGES),
    *((f"{stage}_recommendations", "answers_of_the_current_checkpoint") for stage in STAGES),
    *((f"{stage}_recommendations", "catalogue_survives_parsing") for stage in STAGES),
    *((f"{stage}_recommendations", "keeps_the_contract") for stage in STAGES),
}
#: May fail: the tiny reward model knows nothing.
WARNING = ("reward_model", "ranks_validation_pairs")
#: Without incoming files.
EMPTY = "incoming_ratings"


def partition_of(asset: str) -> str:
    if asset in SOURCE:
        return "sample"
    return "tiny" if asset == "base_model" else PARTITION


def materializations(
    instance: dg.DagsterInstance, run_ids: list[str]
) -> dict[str, dg.AssetMaterialization]:
    """Asset → its materialization event, of these runs."""
    events = [
        record.dagster_event.event_specific_data.materialization
        for run_id in run_ids
        for record in instance.all_logs(run_id)
        if record.dagster_event and record.dagster_event.is_step_materialization
    ]
    assert len({event.asset_key for event in events}) == len(events)
    return {event.asset_key.to_user_string(): event for event in events}


def metadata(event: dg.AssetMaterialization, name: str) -> Any:
    return event.metadata[name].value


@pytest.fixture(scope="module")
def events(finished: FinishedRun) -> dict[str, dg.AssetMaterialization]:
    return materializations(finished.instance, finished.run_ids)


def test_every_asset_is_materialized_in_its_partition(events, finished: FinishedRun) -> None:
    assert set(events) == TABLES | CHECKPOINTS
    for asset, event in events.items():
        assert event.partition == partition_of(asset)
    assert {run.status for run in finished.instance.get_runs()} == {dg.DagsterRunStatus.SUCCESS}


def test_recorded_row_counts_and_data_versions_are_those_of_the_store(
    events, finished: FinishedRun
) -> None:
    store = finished.home.store
    for asset, event in events.items():
        partition = partition_of(asset)
        version = event.tags["dagster/data_version"]
        if asset in CHECKPOINTS:
            assert store.current(asset, partition, "checkpoints") == version
            assert metadata(event, "path").endswith(version)
            assert metadata(event, "reused") is False
            verify_checkpoint(store.checkpoint(asset, partition))
        else:
            table = store.read_table(asset, partition)
            assert table.version == version
            assert metadata(event, "dagster/row_count") == len(table.frame)
            assert (len(table.frame) > 0) == (asset != EMPTY)
            assert metadata(event, "preview").count("\n") >= 1 + (asset != EMPTY)


def test_the_tables_hold_what_the_sample_holds(events) -> None:
    rows = {name: metadata(events[name], "dagster/row_count") for name in TABLES}
    assert (rows["ratings"], rows["movies"], rows["users"]) == (24_876, 260, 500)
    assert rows["user_splits"] == 500
    assert rows["prompts"] == rows["interaction_windows"] <= 500
    # a row per test window and decoding: free, constrained, ranked, ranked-ease
    windows, of_stage = rows["base_responses"] // 4, rows["base_responses"]
    assert rows["sft_responses"] == of_stage == 4 * windows
    assert rows["base_recommendations"] == 5 * of_stage
    assert rows["baseline_recommendations"] == 13 * 5 * windows
    assert rows["user_metrics"] == 4 * of_stage + 13 * windows
    assert rows["beyond_accuracy"] == rows["metric_table"] == 4 * 4 + 13


def test_leave_last_out_ranks_the_last_film_of_every_user(events, finished: FinishedRun) -> None:
    table = finished.home.store.read_table("leave_last_out", PARTITION).frame
    assert table["recommender"].tolist() == [
        name for name in ("popularity", "itemknn", "ease") for _ in range(2)
    ]
    assert table["k"].tolist() == [5, 10] * 3
    assert set(table["n_users"]) == {500} and table["n_items"].max() <= 260
    at_10 = table[table["k"] == 10]
    assert at_10["hr"].between(at_10["hr_low"], at_10["hr_high"]).all()
    assert (at_10["hr_low"] > 10 / 260).all()  # better than chance
    for name in ("popularity", "itemknn", "ease"):
        assert 0 <= metadata(events["leave_last_out"], f"seconds_{name}") < 60


def test_comparisons_and_groups_stand_on_the_same_users(finished: FinishedRun) -> None:
    store = finished.home.store
    table = store.read_table("metric_table", PARTITION).frame
    compared = store.read_table("comparisons", PARTITION).frame
    assert set(compared["n_users"]) == set(table["n_users"])
    assert compared["reason"].value_counts().to_dict() == {
        "predecessor": 12,
        "free decoding": 12,
        "proposer": 4,  # each stage's hybrid against EASE
        "best classical": 16 + 5 + 6,  # every row but the best of its information set
        "popularity": 16 * 2 + 5 + 6,  # an LLM's rows against both popularity lists
    }
    before = compared[compared["reason"] == "predecessor"].set_index(["stage", "decoding"])
    mine = table[table["versus"].notna()].set_index(["stage", "decoding"])
    assert mine["ndcg_difference_p"].to_dict() == before["p"].to_dict()
    assert mine["ndcg_difference_p_holm"].to_dict() == before["p_holm"].to_dict()
    groups = store.read_table("group_metrics", PARTITION).frame
    for _, part in groups.groupby(["stage", "decoding", "information_set", "grouping"]):
        told = part["n_users"].sum() + part["users_left_out"].iloc[0]
        assert told == table["n_users"].iloc[0]
    assert set(groups["grouping"]) == {"age", "gender", "activity", "ground truth popularity"}


def test_the_metric_table_compares_all_stages_on_the_same_users(finished: FinishedRun) -> None:
    store = finished.home.store
    table = store.read_table("metric_table", PARTITION).frame
    rows = zip(table["stage"], table["decoding"], table["information_set"], strict=True)
    assert list(rows) == [
        *(
            (stage, decoding, "prompt")
            for stage in STAGES
            for decoding in ("constrained", "free", "ranked", "ranked-ease")
        ),
        ("als", "ranking", "history"),
        ("als", "ranking", "prompt"),
        ("ease", "ranking", "history"),
        ("ease", "ranking", "prompt"),
        ("itemknn", "ranking", "history"),
        ("itemknn", "ranking", "prompt"),
        ("itemknn-causal", "ranking", "history"),
        ("itemknn-causal", "ranking", "prompt"),
        ("popularity", "ranking", "history"),
        ("popularity", "ranking-shown", "prompt"),
        ("popularity-causal", "ranking", "history"),
        ("sasrec", "ranking", "history"),
        ("sasrec", "ranking", "prompt"),
    ]
    shown = table["decoding"] == "ranking-shown"
    assert table.loc[shown, "stage"].tolist() == ["popularity"]
    assert (table.loc[table["decoding"] == "ranking", "seen"] == 0).all()
    assert table["n_users"].nunique() == 1 and table["n_users"].iloc[0] >= 60
    prompts = store.read_table("prompts", PARTITION)
    test_users = prompts.frame.loc[prompts.frame["split"] == "test", "user_id"].nunique()
    assert table["n_users"].iloc[0] == test_users
    assert set(table["prompts_version"]) == {prompts.version}
    assert table["versus"].isna().tolist() == [True] * 4 + [False] * 12 + [True] * 13
    # what is decoded over the catalogue is valid in every slot, from whatever model
    valid = table[table["decoding"].isin(["constrained", "ranked", "ranked-ease"])]
    assert len(valid) == 12
    assert (valid[["parsable", "in_catalogue"]] == 1).all(axis=None)
    assert (valid[["duplicate", "seen"]] == 0).all(axis=None)
    assert table["ndcg"].between(table["ndcg_low"], table["ndcg_high"]).all()
    # an untrained model hits next to nothing, a ranking by popularity does not
    popularity = table[table["stage"] == "popularity"]
    assert popularity["ndcg_low"].min() > 0
    assert popularity["seen"].tolist()[0] == 0


def test_the_blocking_checks_are_recorded_as_passed(finished: FinishedRun) -> None:
    checks = [
        record.dagster_event.event_specific_data
        for run_id in finished.run_ids
        for record in finished.instance.all_logs(run_id)
        if record.dagster_event
        and record.dagster_event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
    ]
    found = {(c.asset_key.to_user_string(), c.check_name): c for c in checks}
    assert set(found) == CHECKS | {WARNING}
    assert all(check.passed for name, check in found.items() if name != WARNING)
    assert found[WARNING].severity == dg.AssetCheckSeverity.WARN


def test_training_reports_progress_as_observations(finished: FinishedRun) -> None:
    records = finished.instance.fetch_observations(dg.AssetKey("sft_checkpoint"), limit=100).records
    last = records[0].event_log_entry.asset_observation
    steps = metadata(last, "of")
    assert metadata(last, "step") == steps == 8  # 64 examples in batches of 8
    assert last.partition == PARTITION
    assert metadata(last, "loss") > 0


def test_the_manifest_tells_where_the_checkpoint_comes_from(finished: FinishedRun) -> None:
    store = finished.home.store
    manifest = read_manifest(store.checkpoint("sft_checkpoint", PARTITION))
    recipe = load_recipe("tiny")
    assert manifest["determinants"] == {
        "base_model": store.current("base_model", "tiny", "checkpoints"),
        "prompts": store.current("prompts", PARTITION, "tables"),
        "recipe": recipe.sft.model_dump(),
        "seed": recipe.seed,
        "code": manifest["determinants"]["code"],
    }
    assert manifest["facts"]["run_id"] == finished.run_ids[-1]
    assert set(manifest["facts"]["libraries"]) >= {"torch", "transformers", "peft", "trl"}
    assert {name.rsplit(".", 1)[-1] for name in manifest["files"]} <= {"safetensors", "json"}
    assert not list((finished.home.location / "work").rglob("checkpoint-*"))


def test_an_identical_run_trains_nothing_and_publishes_equal_versions(
    copied: tuple[Home, dg.DagsterInstance],
    finished: FinishedRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("trained although the version is published")

    monkeypatch.setattr(sft, "train_sft_on_prompts", refuse)
    home, instance = copied
    again = materializations(instance, home.run(instance))
    for name in CHECKPOINTS:
        assert metadata(again[name], "reused") is True
    path = home.store.checkpoint("sft_checkpoint", PARTITION)
    assert metadata(again["sft_checkpoint"], "path") == str(path)
    assert [p.name for p in path.parent.iterdir() if p.is_dir()] == [path.name]
    for partition in ("sample", PARTITION):
        assert home.current(partition) == finished.home.current(partition)


def test_force_publishes_a_further_attempt_beside_the_first(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = copied
    first = home.store.checkpoint("sft_checkpoint", PARTITION)
    assert home.materialize(instance, "sft_checkpoint", config={"force": True}).success
    second = home.store.checkpoint("sft_checkpoint", PARTITION)
    assert second.name == f"{first.name}-2"
    verify_checkpoint(first)
    # in fp32 on a CPU, training the same again gives the same weights
    weights = "adapter_model.safetensors"
    assert (second / weights).read_bytes() == (first / weights).read_bytes()
    again = home.materialize(instance, "sft_checkpoint")
    assert metadata(again.asset_materializations_for_node("sft_checkpoint")[0], "reused") is True
    assert home.store.current("sft_checkpoint", PARTITION, "checkpoints") == second.name


def test_a_damaged_checkpoint_is_named_and_made_again(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = copied
    first = home.store.checkpoint("sft_checkpoint", PARTITION)
    weights = first / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    reading = home.materialize(instance, "sft_responses")
    assert not reading.success
    assert f"{first.name}/adapter_model.safetensors does not match" in failure(reading)
    assert home.materialize(instance, "sft_checkpoint").success
    second = home.store.checkpoint("sft_checkpoint", PARTITION)
    assert second.name == f"{first.name}-2"


def test_a_seed_override_draws_other_windows_and_the_recipes_own_seed_the_same(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = copied
    before = home.current()
    drawn = ("user_splits", "interaction_windows")
    own = load_recipe("tiny").seed
    assert home.materialize(instance, *drawn, config={"seed": own}).success
    assert home.current() == before
    assert home.materialize(instance, *drawn, config={"seed": own + 1}).success
    changed = {name for name, version in home.current().items() if version != before[name]}
    assert changed == set(drawn)


def test_stages_that_answer_other_prompts_are_left_out_of_the_table(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = copied
    before = home.current()
    drawn = ("user_splits", "interaction_windows")
    assert home.materialize(instance, *drawn, config={"seed": 2}).success
    assert home.materialize(instance, "prompts").success

    nothing_current = home.materialize(instance, "user_metrics", "metric_table")
    assert not nothing_current.success
    message = failure(nothing_current)
    assert f"no recommendations for {PARTITION} answer the current prompts" in message
    for name in (*STAGES, "baseline"):
        assert f"{name}_recommendations is stale" in message
    assert home.current()["metric_table"] == before["metric_table"]

    assert home.materialize(instance, "baseline_recommendations").success
    result = home.materialize(instance, "user_metrics", "metric_table")
    assert not result.success  # p-values of other metrics
    assert "comparisons is stale: its user_metrics_version is" in failure(result)
    result = home.materialize(instance, "user_metrics", "comparisons", "metric_table")
    assert result.success
    left_out = metadata(result.asset_materializations_for_node("user_metrics")[0], "left_out")
    assert [line.split(" is ")[0] for line in left_out] == [
        f"{stage}_recommendations" for stage in STAGES
    ]
    assert all("stale" in line for line in left_out)
    metrics = home.store.current("user_metrics", PARTITION, "tables")
    made = read_provenance(home.store, "user_metrics", PARTITION, metrics)
    assert set(made.inputs) == {"baseline_recommendations", "movies", "prompts", "ratings"}
    table = home.store.read_table("metric_table", PARTITION).frame
    assert set(table["stage"]) == set(STAGES_OF_TABLE["baseline_recommendations"])
    assert set(table["prompts_version"]) == {home.current()["prompts"]}


def test_a_checkpoint_trained_on_other_users_answers_nothing(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    """Another seed splits the users anew: today's test users may have trained that adapter."""
    home, instance = copied
    assert home.materialize(
        instance, "user_splits", "interaction_windows", config={"seed": 2}
    ).success
    assert home.materialize(instance, "prompts").success
    before = home.current()["sft_responses"]
    result = home.materialize(instance, "sft_responses")
    assert not result.success
    assert "was trained on prompts" in failure(result)
    assert "materialize sft_checkpoint again first" in failure(result)
    assert home.current()["sft_responses"] == before


def test_a_step_without_its_inputs_says_what_to_materialize(new_home) -> None:
    home = new_home()
    with home.instance() as instance:
        result = home.materialize(instance, "user_splits")
    assert not result.success
    assert "users has not been materialized for sample" in failure(result)


def test_two_builders_of_one_checkpoint_train_once(
    copied: tuple[Home, dg.DagsterInstance],
    finished: FinishedRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second waits, then finds what the first has published."""
    import shutil
    import threading

    home, instance = copied
    shutil.rmtree(home.location / "checkpoints" / "sft_checkpoint")
    train, training, go_on = sft.train_sft_on_prompts, threading.Event(), threading.Event()
    calls = []

    def slow(*args: Any, **options: Any) -> Any:
        calls.append(1)
        training.set()
        assert go_on.wait(60)
        return train(*args, **options)

    monkeypatch.setattr(sft, "train_sft_on_prompts", slow)
    results = {}

    def build(name: str, own: dg.DagsterInstance) -> None:
        results[name] = home.materialize(own, "sft_checkpoint")

    with dg.instance_for_test() as other:
        first = threading.Thread(target=build, args=("first", instance))
        second = threading.Thread(target=build, args=("second", other))
        first.start()
        assert training.wait(60)
        second.start()
        waiting = "another process is making sft_checkpoint for sample|tiny"
        for _ in range(300):
            logs = [e.user_message for run in other.get_runs() for e in other.all_logs(run.run_id)]
            if any(waiting in line for line in logs):
                break
            second.join(0.1)
        else:
            raise AssertionError(f"the second builder did not wait: {logs}")
        go_on.set()
        first.join(60)
        second.join(60)
    assert len(calls) == 1
    reused = {
        name: metadata(r.asset_materializations_for_node("sft_checkpoint")[0], "reused")
        for name, r in results.items()
    }
    assert reused == {"first": False, "second": True}
    assert home.current(kind="checkpoints") == finished.home.current(kind="checkpoints")


def failure(result: dg.ExecuteInProcessResult) -> str:
    """The messages of the failed steps, causes included."""
    texts = []
    for event in result.all_events:
        if event.is_step_failure:
            error = event.step_failure_data.error
            while error is not None:
                texts.append(error.message)
                error = error.cause
    return "\n".join(texts)
