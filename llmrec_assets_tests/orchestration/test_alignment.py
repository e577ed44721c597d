"""Preference alignment in the graph: nothing can be swapped, leaked or lost unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest

from llmrec_assets.ground.store import read_manifest

if TYPE_CHECKING:
    from conftest import FinishedRun, Home

PARTITION = "sample|tiny"
ALIGNED = ("dpo_checkpoint", "reward_model", "rlhf_checkpoint")


def failure(result: dg.ExecuteInProcessResult) -> str:
    """The messages of everything that failed."""
    said = []
    for event in result.all_events:
        if event.event_type == dg.DagsterEventType.STEP_FAILURE:
            error = event.step_failure_data.error
            while error is not None:
                said.append(error.message)
                error = error.cause
            if event.step_failure_data.user_failure_data:
                said.append(str(event.step_failure_data.user_failure_data.description))
    return "\n".join(said)


def failed_checks(result: dg.ExecuteInProcessResult) -> set[tuple[str, str]]:
    return {
        (check.asset_key.to_user_string(), check.check_name)
        for check in result.get_asset_check_evaluations()
        if not check.passed
    }


# -- what stands in the store -------------------------------------------------------------------


def test_pairs_are_of_the_samples_and_no_test_user_stands_in_them(finished: FinishedRun) -> None:
    store = finished.home.store
    sampled = store.read_table("sampled_responses", PARTITION).frame
    pairs = store.read_table("preference_pairs", PARTITION).frame
    splits = store.read_table("user_splits", PARTITION).frame
    split_of = dict(zip(splits["user_id"], splits["split"], strict=True))
    assert set(sampled["split"]) == {"train", "validation"}
    assert (sampled["split"] == sampled["user_id"].map(split_of)).all()
    assert not sampled.duplicated(["user_id", "window_index", "response"]).any()
    assert (pairs["split"] == pairs["user_id"].map(split_of)).all()
    assert (pairs["chosen_score"] > pairs["rejected_score"]).all()
    texts = set(zip(sampled["user_id"], sampled["response"], strict=True))
    assert set(zip(pairs["user_id"], pairs["rejected"], strict=True)) <= texts


def test_every_training_names_its_inputs_and_its_users(finished: FinishedRun) -> None:
    store = finished.home.store
    splits = store.read_table("user_splits", PARTITION).frame
    train = set(splits.loc[splits["split"] == "train", "user_id"])
    sft = store.current("sft_checkpoint", PARTITION, "checkpoints")
    for asset in ALIGNED:
        manifest = read_manifest(store.checkpoint(asset, PARTITION))
        assert manifest["determinants"]["sft_checkpoint"] == sft
        assert set(manifest["facts"]["trained_user_ids"]) <= train
        assert manifest["facts"]["trained_user_ids"]
        assert {name.rsplit(".", 1)[-1] for name in manifest["files"]} <= {"safetensors", "json"}
    rlhf = read_manifest(store.checkpoint("rlhf_checkpoint", PARTITION))
    reward = store.current("reward_model", PARTITION, "checkpoints")
    assert rlhf["determinants"]["reward_model"] == reward


def test_every_row_of_the_metric_table_names_the_checkpoint_that_answered(
    finished: FinishedRun,
) -> None:
    store = finished.home.store
    table = store.read_table("metric_table", PARTITION).frame.drop_duplicates("stage")
    answered = dict(zip(table["stage"], table["checkpoint_version"], strict=True))
    for stage in ("sft", "dpo", "rlhf"):
        assert answered[stage] == store.current(f"{stage}_checkpoint", PARTITION, "checkpoints")
    assert answered["base"] == store.current("base_model", "tiny", "checkpoints")
    versus = dict(zip(table["stage"], table["versus"], strict=True))
    assert (versus["sft"], versus["dpo"], versus["rlhf"]) == ("base", "sft", "sft")


def test_the_report_is_on_disk_with_every_stage_and_curve(finished: FinishedRun) -> None:
    directory = finished.home.store.checkpoint("report", PARTITION)
    html = (directory / "report.html").read_text()
    markdown = (directory / "report.md").read_text()
    for stage in ("base", "sft", "dpo", "rlhf", "popularity"):
        assert stage in html and stage in markdown
    for words in ("knows the files by heart", "The last film of every user", "is a hybrid"):
        assert words in html and words in markdown
    assert "<script" not in html
    assert len(list((directory / "curves").glob("*.png"))) == 4


# -- attempts to evaluate the wrong thing -------------------------------------------------------


def _swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def test_two_swapped_checkpoints_fail_the_check_of_both_stages(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = copied
    _swap(*(home.store.checkpoint(f"{stage}_checkpoint", PARTITION) for stage in ("dpo", "rlhf")))
    before = home.current()
    for stage in ("dpo", "rlhf"):
        result = home.materialize(instance, f"{stage}_responses")
        assert not result.success
        assert failed_checks(result) == {(f"{stage}_responses", "answered_by_its_own_checkpoint")}
        assert f"expected {stage}_checkpoint" in failure(result)
    assert home.current() == before


def test_weights_swapped_inside_their_directories_do_not_match_the_manifest(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = copied
    weights = "adapter_model.safetensors"
    _swap(
        *(
            home.store.checkpoint(f"{stage}_checkpoint", PARTITION) / weights
            for stage in ("dpo", "rlhf")
        )
    )
    result = home.materialize(instance, "rlhf_responses")
    assert not result.success
    assert f"{weights} does not match its manifest" in failure(result)


def test_answers_of_another_stage_are_not_scored_as_this_one(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = copied
    dpo = home.store.read_table("dpo_responses", PARTITION).frame
    home.store.publish_table("rlhf_responses", PARTITION, dpo)
    result = home.materialize(instance, "rlhf_recommendations")
    assert failed_checks(result) == {("rlhf_recommendations", "answers_of_the_current_checkpoint")}
    assert "rlhf_responses holds answers of dpo" in failure(result)


def test_a_policy_trained_on_an_older_sft_checkpoint_answers_nothing(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = copied
    assert home.materialize(instance, "sft_checkpoint", config={"seed": 5}).success
    for stage in ("dpo", "rlhf"):
        result = home.materialize(instance, f"{stage}_responses")
        assert failed_checks(result) == {(f"{stage}_responses", "answered_by_its_own_checkpoint")}
        assert "was trained on sft_checkpoint" in failure(result)
    for asset, stale in (
        ("preference_pairs", "sampled_responses is stale"),
        ("dpo_checkpoint", "preference_pairs is stale"),
        ("reward_model", "preference_pairs is stale"),
        ("rlhf_checkpoint", "was trained on sft_checkpoint"),
    ):
        result = home.materialize(instance, asset)
        assert not result.success
        assert stale in failure(result), asset


# -- attempts to train on the wrong users -------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_pairs_of_other_users_cannot_be_published(
    copied: tuple[Home, dg.DagsterInstance], split: str
) -> None:
    """Samples relabelled as training data fail the check against the user splits."""
    home, instance = copied
    store = home.store
    sampled = store.read_table("sampled_responses", PARTITION).frame
    prompts = store.read_table("prompts", PARTITION).frame
    one = prompts[prompts["split"] == split].iloc[0]
    sampled["user_id"], sampled["window_index"] = sampled["user_id"].copy(), 0
    sampled.loc[sampled["user_id"] == sampled["user_id"].iloc[0], "user_id"] = one["user_id"]
    store.publish_table("sampled_responses", PARTITION, sampled)
    before = home.current()["preference_pairs"]
    result = home.materialize(instance, "preference_pairs")
    assert failed_checks(result) == {("preference_pairs", "pairs_keep_the_split")}
    assert home.current()["preference_pairs"] == before


@pytest.mark.parametrize("asset", ALIGNED)
def test_a_training_that_saw_a_test_user_is_not_published(
    copied: tuple[Home, dg.DagsterInstance], monkeypatch: pytest.MonkeyPatch, asset: str
) -> None:
    """Whatever a training function selects, its users are compared with the splits."""
    from llmrec_assets.models import dpo, ppo, reward

    home, instance = copied
    splits = home.store.read_table("user_splits", PARTITION).frame
    stranger = int(splits.loc[splits["split"] == "test", "user_id"].iloc[0])
    module, name = {
        "dpo_checkpoint": (dpo, "train_dpo_on_pairs"),
        "reward_model": (reward, "train_reward_on_pairs"),
        "rlhf_checkpoint": (ppo, "train_ppo"),
    }[asset]
    train: Callable[..., Any] = getattr(module, name)

    def cheat(*args: Any, **options: Any) -> Any:
        path, facts = train(*args, **options)
        return path, {**facts, "trained_user_ids": [*facts["trained_user_ids"], stranger]}

    monkeypatch.setattr(module, name, cheat)
    before = home.current(kind="checkpoints")[asset]
    result = home.materialize(instance, asset, config={"seed": 9})
    assert failed_checks(result) >= {(asset, "trained_on_training_users_only")}
    assert f"user {stranger} took part in the training" in failure(result)
    assert home.current(kind="checkpoints")[asset] == before
