"""Which recommendation tables count: those that answer the current prompts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.recommendations import recommendation_frame
from llmrec_assets.ground.stages import (
    RECOMMENDATION_TABLES,
    current_stages,
    missing_stages,
    require_current,
)
from llmrec_assets.ground.store import Store

PARTITION = "sample|tiny"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path)


def recommendations(stage: str, *prompts_versions: str) -> pd.DataFrame:
    """One slot for each version given, of users 1, 2, …"""
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
            )
            for user, version in enumerate(prompts_versions, start=1)
        ]
    )


def test_current_tables_are_kept_with_their_versions(store):
    versions = {
        asset: store.publish_table(asset, PARTITION, recommendations(asset, "now", "now"))
        for asset in RECOMMENDATION_TABLES
    }
    found = current_stages(store, PARTITION, "now")
    assert found.left_out == []
    assert found.recommendations["stage"].tolist() == [
        stage for stage in RECOMMENDATION_TABLES for _ in range(2)
    ]
    assert found.recommendations["recommendations_version"].tolist() == [
        versions[stage] for stage in found.recommendations["stage"]
    ]
    assert found.recommendations.index.tolist() == list(range(6))


def test_missing_and_stale_tables_are_named_and_left_out(store):
    store.publish_table("base_recommendations", PARTITION, recommendations("base", "now"))
    store.publish_table("sft_recommendations", PARTITION, recommendations("sft", "before"))
    found = current_stages(store, PARTITION, "now")
    assert found.recommendations["stage"].tolist() == ["base"]
    stale, missing = found.left_out
    assert stale.startswith("sft_recommendations is stale")
    assert "(now)" in stale and "materialize it again" in stale
    assert missing == f"baseline_recommendations is missing: never materialized for {PARTITION}"


def test_a_table_of_two_versions_is_stale(store):
    store.publish_table("base_recommendations", PARTITION, recommendations("base", "now"))
    store.publish_table("sft_recommendations", PARTITION, recommendations("sft", "now", "before"))
    found = current_stages(store, PARTITION, "now")
    assert found.recommendations["stage"].tolist() == ["base"]
    assert found.left_out[0].startswith("sft_recommendations is stale")


def test_an_empty_table_is_not_called_stale(store):
    store.publish_table("base_recommendations", PARTITION, recommendations("base", "now"))
    store.publish_table("sft_recommendations", PARTITION, recommendations("sft"))
    found = current_stages(store, PARTITION, "now")
    assert found.recommendations["stage"].tolist() == ["base"]
    assert found.left_out[0].startswith("sft_recommendations is empty")


def test_a_table_made_again_is_current_again(store):
    for version in ("before", "now"):
        store.publish_table("sft_recommendations", PARTITION, recommendations("sft", version))
    assert current_stages(store, PARTITION, "now").recommendations["stage"].tolist() == ["sft"]


def test_other_partitions_do_not_count(store):
    store.publish_table("sft_recommendations", "sample|paper", recommendations("sft", "now"))
    with pytest.raises(DataError, match=r"no recommendations for sample\|tiny") as error:
        current_stages(store, PARTITION, "now")
    for asset in RECOMMENDATION_TABLES:
        assert f"{asset} is missing" in str(error.value)


def test_nothing_current_says_why_of_each(store):
    store.publish_table("base_recommendations", PARTITION, recommendations("base", "before"))
    with pytest.raises(DataError) as error:
        current_stages(store, PARTITION, "now")
    assert "base_recommendations is stale" in str(error.value)
    assert "sft_recommendations is missing" in str(error.value)


def test_missing_stages_are_those_that_no_row_has():
    assert missing_stages(recommendations("sft", "now")) == ["base", "popularity"]
    every = pd.DataFrame({"stage": ["popularity", "base", "sft", "dpo"]})
    assert missing_stages(every) == []
    assert missing_stages(every.head(0)) == ["base", "sft", "popularity"]


def test_metrics_of_other_prompts_are_refused():
    require_current(pd.DataFrame({"prompts_version": ["now", "now"]}), "now")
    with pytest.raises(DataError, match=r"stale.* prompts a, b, the current ones are now"):
        require_current(pd.DataFrame({"prompts_version": ["b", "now", "a", "b"]}), "now")
