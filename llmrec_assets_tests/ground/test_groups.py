"""Groups of users and their metrics, by hand."""

from __future__ import annotations

import pandas as pd
import pytest
from test_comparisons import BASE, RECIPE, SFT, scores

from llmrec_assets.ground.groups import group_metrics, user_groups
from llmrec_assets.ground.schemas import GROUP_METRICS
from llmrec_assets.ground.tables import conform

MOVIES = pd.DataFrame({"movie_id": [1, 2, 3], "canonical_movie_id": [1, 2, 1]})
#: film 1 (also as 3) was rated by training users 100 and 101, film 2 by nobody
RATINGS = pd.DataFrame({"user_id": [100, 101, 101], "movie_id": [1, 3, 1], "timestamp": 5})


def groups(ages=(17, 18, 56), bands=(None, None, None), history=(10, 20, 30), until=None):
    n = len(ages)
    users = pd.DataFrame(
        {"user_id": range(n), "age": pd.array(ages, dtype="Int16"),
         "age_band": pd.Series(bands, dtype="string"), "gender": ["M", "F"] * (n // 2) + ["M"]}
    )  # fmt: skip
    windows = pd.DataFrame({"user_id": range(n), "window_index": 0, "n_history": history})
    truths = [[2], [1, 2], [3]] + [[1]] * (n - 3)
    prompts = windows.assign(ground_truth_movie_ids=truths).drop(columns="n_history")
    splits = pd.DataFrame({"user_id": [100, 101], "split": "train"})
    found = user_groups(prompts, windows, users, RATINGS, splits, MOVIES, until)
    return {
        name: dict(zip(part["user_id"], part["group"], strict=True))
        for name, part in found.groupby("grouping")
    }


def test_every_grouping_by_hand() -> None:
    assert groups() == {
        "age": {0: "under 18", 1: "18-24", 2: "56+"},
        "gender": {0: "men", 1: "women", 2: "men"},
        "activity": {0: "low", 1: "middle", 2: "high"},
        # mean training users: 0, 1, 2
        "ground truth popularity": {0: "low", 1: "middle", 2: "high"},
    }
    # nothing had been rated before any event of the ratings: all are alike
    early = groups(until=-1)["ground truth popularity"]
    assert early == {0: "low", 1: "low", 2: "low"}
    assert groups(bands=("25-34", "56+", None), ages=(None, None, 49))["age"] == {
        0: "25-34", 1: "56+", 2: "45-49",
    }  # fmt: skip
    assert groups(ages=(None, 30, 34))["age"] == {1: "25-34", 2: "25-34"}


def test_who_shares_a_value_shares_a_tercile() -> None:
    activity = groups(ages=(20,) * 5, bands=(None,) * 5, history=(5, 5, 5, 5, 9))["activity"]
    assert activity == {0: "low", 1: "low", 2: "low", 3: "low", 4: "high"}


def test_group_metrics_by_hand() -> None:
    n = 24
    metrics = scores({BASE: [0.0] * n, SFT: [[1.0, 0.0]] * 12 + [0.25] * 12})
    who = pd.DataFrame(
        {
            "user_id": range(n),
            "grouping": "gender",
            "group": ["men"] * 12 + ["women"] * 10 + ["other"] * 2,
            "position": [1] * 12 + [0] * 10 + [2] * 2,
        }
    )
    # user 23 has no age; nobody else has a band of ten
    ages = who.iloc[:23].assign(grouping="age", group="young", position=0)
    table = group_metrics(metrics, pd.concat([who, ages]), RECIPE, 0, "m")
    conform(table, GROUP_METRICS, "group_metrics")
    shown = table[["grouping", "group", "stage", "n_users", "hits", "users_left_out"]]
    assert shown.to_numpy().tolist() == [
        ["gender", "women", "base", 10, 0, 2],
        ["gender", "women", "sft", 10, 10, 2],
        ["gender", "men", "base", 12, 0, 2],
        ["gender", "men", "sft", 12, 12, 2],
        ["age", "young", "base", 23, 0, 1],
        ["age", "young", "sft", 23, 23, 1],
    ]
    assert table["ndcg"].tolist()[:4] == [0, 0.25, 0, 0.5]
    # all alike: the interval is the estimate; no hit: the exact bound
    assert (table["ndcg_low"][1], table["ndcg_high"][1]) == (0.25, 0.25)
    assert table["ndcg_high"][0] == pytest.approx(1 - 0.025 ** (1 / 10))


def test_too_few_users_and_nobody_are_tables() -> None:
    metrics = scores({BASE: [0.0] * 9})
    who = pd.DataFrame({"user_id": range(9), "grouping": "g", "group": "a", "position": 0})
    for given in (metrics, metrics.iloc[:0]):
        table = group_metrics(given, who, RECIPE, 0, "m")
        conform(table, GROUP_METRICS, "group_metrics")
        assert table.empty
