"""Which recommendation tables count: those that answer the current prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.recommendations import recommendation_frame
from llmrec_assets.ground.stages import (
    CHECKPOINT_OF_STAGE,
    RECOMMENDATION_TABLES,
    STAGES_OF_TABLE,
    checkpoint_problems,
    current_stages,
    missing_stages,
    require_checkpoint,
    require_current,
    require_sampled_from,
    response_problems,
    trained_user_problems,
)
from llmrec_assets.ground.store import Store, checkpoint_version

PARTITION = "sample|tiny"


def checkpoint(store: Store, asset: str, partition: str = PARTITION, **determinants: str) -> Path:
    version = checkpoint_version(asset, determinants)
    work = store.work_directory(asset, partition, version)
    (work / "adapter_config.json").write_text(json.dumps({"of": asset}))
    return store.publish_checkpoint(
        asset, partition, version, work, determinants=determinants, facts={}
    )


#: What the policies of ``store`` were made from, in the order they were made.
BASE = checkpoint_version("base_model", {})
SFT = checkpoint_version("sft_checkpoint", {"base_model": BASE})
ON_SFT = {"base_model": BASE, "sft_checkpoint": SFT}
MADE_FROM = {
    "base_model": {},
    "sft_checkpoint": {"base_model": BASE},
    "dpo_checkpoint": ON_SFT,
    "rlhf_checkpoint": ON_SFT,
}
ANSWERED = {
    stage: checkpoint_version(asset, MADE_FROM[asset])
    for stage, asset in CHECKPOINT_OF_STAGE.items()
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Holds a checkpoint for every stage."""
    store = Store.at(tmp_path)
    for asset, determinants in MADE_FROM.items():
        partition = "tiny" if asset == "base_model" else PARTITION
        checkpoint(store, asset, partition, **determinants)
    return store


def recommendations(
    stage: str, *prompts_versions: str, checkpoint: str | None = None
) -> pd.DataFrame:
    """One slot for each version given, of users 1, 2, …, by the stage's checkpoint."""
    return recommendation_frame(
        [
            (
                user,
                0,
                stage,
                "free",
                "prompt",
                1,
                None,
                None,
                "missing",
                None,
                False,
                False,
                version,
                checkpoint or ANSWERED.get(stage),
                "answered",
            )
            for user, version in enumerate(prompts_versions, start=1)
        ]
    )


def test_current_tables_are_kept_with_their_versions(store):
    versions = {
        stages[0]: store.publish_table(asset, PARTITION, recommendations(stages[0], "now", "now"))
        for asset, stages in STAGES_OF_TABLE.items()
    }
    found = current_stages(store, PARTITION, "now", "answered")
    assert found.left_out == []
    assert found.recommendations["stage"].tolist() == [
        stage for stage in ("base", "sft", "dpo", "rlhf", "popularity") for _ in range(2)
    ]
    assert found.recommendations["recommendations_version"].tolist() == [
        versions[stage] for stage in found.recommendations["stage"]
    ]
    assert found.recommendations.index.tolist() == list(range(10))


def test_missing_and_stale_tables_are_named_and_left_out(store):
    store.publish_table("base_recommendations", PARTITION, recommendations("base", "now"))
    store.publish_table("sft_recommendations", PARTITION, recommendations("sft", "before"))
    found = current_stages(store, PARTITION, "now", "answered")
    assert found.recommendations["stage"].tolist() == ["base"]
    stale, *_, missing = found.left_out
    assert stale.startswith("sft_recommendations is stale")
    assert "(now)" in stale and "materialize it again" in stale
    assert missing == f"baseline_recommendations is missing: never materialized for {PARTITION}"


def test_a_table_of_two_versions_is_stale(store):
    store.publish_table("base_recommendations", PARTITION, recommendations("base", "now"))
    store.publish_table("sft_recommendations", PARTITION, recommendations("sft", "now", "before"))
    found = current_stages(store, PARTITION, "now", "answered")
    assert found.recommendations["stage"].tolist() == ["base"]
    assert found.left_out[0].startswith("sft_recommendations is stale")


def test_an_empty_table_is_not_called_stale(store):
    store.publish_table("base_recommendations", PARTITION, recommendations("base", "now"))
    store.publish_table("sft_recommendations", PARTITION, recommendations("sft"))
    found = current_stages(store, PARTITION, "now", "answered")
    assert found.recommendations["stage"].tolist() == ["base"]
    assert found.left_out[0].startswith("sft_recommendations is empty")


def test_a_table_made_again_is_current_again(store):
    for version in ("before", "now"):
        store.publish_table("sft_recommendations", PARTITION, recommendations("sft", version))
    assert current_stages(store, PARTITION, "now", "answered").recommendations[
        "stage"
    ].tolist() == ["sft"]


def test_other_partitions_do_not_count(store):
    store.publish_table("sft_recommendations", "sample|paper", recommendations("sft", "now"))
    with pytest.raises(DataError, match=r"no recommendations for sample\|tiny") as error:
        current_stages(store, PARTITION, "now", "answered")
    for asset in RECOMMENDATION_TABLES:
        assert f"{asset} is missing" in str(error.value)


def test_nothing_current_says_why_of_each(store):
    store.publish_table("base_recommendations", PARTITION, recommendations("base", "before"))
    with pytest.raises(DataError) as error:
        current_stages(store, PARTITION, "now", "answered")
    assert "base_recommendations is stale" in str(error.value)
    assert "sft_recommendations is missing" in str(error.value)


def test_missing_stages_are_those_that_no_row_has():
    classical = STAGES_OF_TABLE["baseline_recommendations"]
    assert missing_stages(recommendations("sft", "now")) == ["base", "dpo", "rlhf", *classical]
    every = pd.DataFrame({"stage": [*classical, "base", "sft", "dpo", "rlhf", "svd"]})
    assert missing_stages(every) == []
    assert missing_stages(every.head(0)) == ["base", "sft", "dpo", "rlhf", *classical]


def test_metrics_of_other_prompts_or_checkpoints_are_refused(store):
    metrics = recommendations("sft", "now", "now")
    require_current(metrics, "user_metrics", store, PARTITION, "now", "answered")
    mixed = recommendations("sft", "b", "now", "a", "b")
    with pytest.raises(DataError, match=r"stale.* prompts a, b, the current ones are now"):
        require_current(mixed, "user_metrics", store, PARTITION, "now", "answered")
    older = recommendations("dpo", "now", checkpoint="older")
    with pytest.raises(DataError, match=r"metric_table is stale: dpo_checkpoint older answered"):
        require_current(older, "metric_table", store, PARTITION, "now", "answered")


@pytest.mark.parametrize("made_by", ["older", None])
def test_classical_lists_of_another_recipe_are_refused_with_the_remedy(store, made_by):
    lists = recommendations("ease", "now").assign(answer_version=made_by)
    said = rf"made by baselines {made_by or 'unknown'}, .*`baselines` is answered; materialize "
    with pytest.raises(DataError, match=said + "user_metrics again"):
        require_current(lists, "user_metrics", store, PARTITION, "now", "answered")
    store.publish_table("base_recommendations", PARTITION, recommendations("base", "now"))
    store.publish_table("baseline_recommendations", PARTITION, lists)
    with pytest.raises(DataError, match=said + "baseline_recommendations again"):
        current_stages(store, PARTITION, "now", "answered")


def test_a_policy_on_a_replaced_sft_policy_is_left_out(store):
    """Its paired difference would be to a policy it never stood on."""
    for stage in ("base", "sft", "dpo", "rlhf"):
        store.publish_table(f"{stage}_recommendations", PARTITION, recommendations(stage, "now"))
    again = checkpoint(store, "sft_checkpoint", base_model=BASE, seed="2").name
    retrained = recommendations("sft", "now", checkpoint=again)
    store.publish_table("sft_recommendations", PARTITION, retrained)
    found = current_stages(store, PARTITION, "now", "answered")
    assert set(found.recommendations["stage"]) == {"base", "sft"}
    for asset, line in zip(("dpo", "rlhf"), found.left_out, strict=False):
        assert line.startswith(f"{asset}_recommendations is stale: {asset}_checkpoint ")
        assert f"was trained on sft_checkpoint {SFT}, the current one is {again}" in line


def test_a_stage_whose_checkpoint_is_gone_is_left_out(store):
    for stage in ("base", "sft"):
        store.publish_table(f"{stage}_recommendations", PARTITION, recommendations(stage, "now"))
    shutil.rmtree(Path(str(store.root)) / "checkpoints" / "sft_checkpoint")
    found = current_stages(store, PARTITION, "now", "answered")
    assert set(found.recommendations["stage"]) == {"base"}
    assert "the current one is missing" in found.left_out[0]


# -- checkpoints: whose they are and what they were trained on ---------------------------------


def test_a_checkpoint_of_the_current_inputs_has_no_problem(store):
    path = checkpoint(store, "sft_checkpoint", prompts="now", base_model="b")
    inputs = {"prompts": "now", "base_model": "b"}
    assert checkpoint_problems(path, "sft_checkpoint", PARTITION, inputs) == []
    require_checkpoint(path, "sft_checkpoint", PARTITION, inputs)


def test_swapped_checkpoint_directories_are_found(store):
    dpo = checkpoint(store, "dpo_checkpoint", prompts="now")
    rlhf = checkpoint(store, "rlhf_checkpoint", prompts="now")
    aside = dpo.with_name("aside")
    dpo.rename(aside), rlhf.rename(dpo), aside.rename(rlhf)
    for path, asset in ((dpo, "dpo_checkpoint"), (rlhf, "rlhf_checkpoint")):
        assert store.checkpoint(asset, PARTITION) == path, "every file matches its manifest"
        (other,) = [
            problem
            for problem in checkpoint_problems(path, asset, PARTITION, {"prompts": "now"})
            if "its asset is" in problem
        ]
        assert f"expected {asset}" in other and "with force" in other


def test_a_checkpoint_of_another_partition_or_of_other_inputs_is_found(store):
    path = checkpoint(store, "sft_checkpoint", "ml-100k|tiny", prompts="before")
    problems = checkpoint_problems(path, "sft_checkpoint", PARTITION, {"prompts": "now"})
    assert "its partition is ml-100k|tiny" in problems[0]
    assert "trained on prompts before, the current version is now" in problems[1]
    with pytest.raises(DataError, match="trained on prompts before"):
        require_checkpoint(path, "sft_checkpoint", "ml-100k|tiny", {"prompts": "now"})


def test_lists_of_another_stage_or_of_an_older_checkpoint_are_left_out(store):
    current = SFT
    store.publish_table("base_recommendations", PARTITION, recommendations("base", "now"))
    for name, frame in {
        "dpo_recommendations": recommendations("sft", "now", checkpoint=current),
        "sft_recommendations": recommendations("sft", "now", checkpoint="older"),
    }.items():
        store.publish_table(name, PARTITION, frame)
    found = current_stages(store, PARTITION, "now", "answered")
    assert found.recommendations["stage"].tolist() == ["base"]
    assert found.left_out[0] == (
        f"sft_recommendations is stale: sft_checkpoint older answered, the current one is "
        f"{current}; materialize it again"
    )
    assert found.left_out[1].startswith("dpo_recommendations holds lists of sft, not of dpo")
    store.publish_table(
        "sft_recommendations", PARTITION, recommendations("sft", "now", checkpoint=current)
    )
    assert set(current_stages(store, PARTITION, "now", "answered").recommendations["stage"]) == {
        "base",
        "sft",
    }


def test_answers_of_another_stage_or_checkpoint_are_found(store):
    answers = recommendations("rlhf", "now")
    assert response_problems(answers, "rlhf", store, PARTITION, "now") == []
    assert response_problems(answers.head(0), "rlhf", store, PARTITION, "now") == []
    (other,) = response_problems(answers.assign(stage="dpo"), "rlhf", store, PARTITION, "now")
    assert other == "rlhf_responses holds answers of dpo"
    (stale,) = response_problems(
        answers.assign(checkpoint_version="older"), "rlhf", store, PARTITION, "now"
    )
    assert "older answered, the current one is" in stale
    (others,) = response_problems(answers, "rlhf", store, PARTITION, "newer")
    assert "answers the prompts now, the current ones are newer" in others


def test_whoever_trained_on_others_than_training_users_is_named():
    splits = pd.DataFrame({"user_id": [1, 2, 3], "split": ["train", "validation", "test"]})
    assert trained_user_problems([1], splits) == []
    found = trained_user_problems([1, 2, 3, 4], splits)
    assert [problem.split(" took")[0] for problem in found] == ["user 2", "user 3", "user 4"]
    assert found[1].endswith("their split is test")
    assert "does not say" in trained_user_problems(None, splits)[0]


def test_samples_of_another_policy_are_refused():
    samples = pd.DataFrame({"checkpoint_version": ["c"], "prompts_version": ["p"]})
    require_sampled_from(samples, "c", "p")
    with pytest.raises(DataError, match="sampled_responses is stale: its checkpoint_version is c"):
        require_sampled_from(samples, "d", "p")
    with pytest.raises(DataError, match="preference_pairs is stale: its prompts_version is p"):
        require_sampled_from(samples, "c", "q", "preference_pairs")
