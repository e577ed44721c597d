"""Which rows are compared, and the numbers of a comparison by hand."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest

from llmrec_assets.ground.comparisons import comparison_pairs, comparisons
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.evaluation import metric_table
from llmrec_assets.ground.recipes import EvaluationRecipe
from llmrec_assets.ground.schemas import COMPARISONS, USER_METRICS
from llmrec_assets.ground.tables import conform

RECIPE = EvaluationRecipe(resamples=500)

BASE, SFT, DPO = (("base", "free", "prompt"), ("sft", "free", "prompt"), ("dpo", "free", "prompt"))
RANKED = ("sft", "ranked", "prompt")
POPULAR, KNOWING = ("popularity", "ranking", "prompt"), ("popularity", "ranking", "history")
EASE = ("ease", "ranking", "history")


def scores(by_row: dict[tuple, list], protocol: str = "user-split") -> pd.DataFrame:
    """``USER_METRICS``; a score is a user's, or a list of their windows'."""
    rows = []
    for (stage, decoding, sees), users in by_row.items():
        for user, given in enumerate(users):
            for window, ndcg in enumerate(given if isinstance(given, list) else [given]):
                rows.append(
                    dict.fromkeys(USER_METRICS.names, 0)
                    | {"user_id": user, "window_index": window, "protocol": protocol}
                    | {"stage": stage, "decoding": decoding, "information_set": sees}
                    | {"ndcg": ndcg, "hits": int(ndcg > 0), "n_ground_truth": 1}
                    | {"prompts_version": "p", "recommendations_version": "r"}
                    | {"checkpoint_version": None, "answer_version": None}
                )
    return pd.DataFrame(rows, columns=USER_METRICS.names)


def test_the_pairs_by_hand() -> None:
    rows = [BASE, SFT, RANKED, POPULAR, KNOWING, EASE]
    ndcg = dict(zip(rows, [0.0, 0.01, 0.05, 0.04, 0.05, 0.06], strict=True))
    assert comparison_pairs(rows[::-1], ndcg) == [
        ("predecessor", SFT, BASE),
        ("free decoding", RANKED, SFT),
        ("best classical", BASE, POPULAR),
        ("best classical", SFT, POPULAR),
        ("best classical", RANKED, POPULAR),
        ("best classical", KNOWING, EASE),
        ("popularity", BASE, KNOWING),
        ("popularity", BASE, POPULAR),
        ("popularity", SFT, KNOWING),
        ("popularity", SFT, POPULAR),
        ("popularity", RANKED, KNOWING),
        ("popularity", RANKED, POPULAR),
        ("popularity", EASE, KNOWING),
    ]
    # what the LLM adds to a hybrid is its difference to the one who proposed
    hybrid, own = ("sft", "ranked-ease", "prompt"), ("ease", "ranking", "prompt")
    pairs = comparison_pairs([hybrid, own, POPULAR], {hybrid: 0.1, own: 0.2, POPULAR: 0.3})
    assert [pair for pair in pairs if pair[0] == "proposer"] == [("proposer", hybrid, own)]
    # within a decoding only: a ranked DPO list is not compared to free SFT text
    assert ("predecessor", ("dpo", "ranked", "prompt"), RANKED) in comparison_pairs(
        [SFT, RANKED, DPO, ("dpo", "ranked", "prompt")], dict.fromkeys([SFT, RANKED], 0.0)
    )
    assert comparison_pairs([SFT], {SFT: 0.1}) == []


def test_a_comparison_by_hand() -> None:
    # user 0: windows first, then users: (1 + 0) / 2
    table = comparisons(
        scores({BASE: [[0, 0], 0, 0, 0], SFT: [[1, 0], 0.5, 0.25, 0]}), RECIPE, 0, "m"
    )
    conform(table, COMPARISONS, "comparisons")
    (row,) = table.to_dict("records")
    assert (row["reason"], row["stage"], row["versus_stage"]) == ("predecessor", "sft", "base")
    assert row["difference"] == (0.5 + 0.5 + 0.25) / 4
    assert row["deviation"] == pytest.approx(np.std([0.5, 0.5, 0.25, 0], ddof=1))
    assert (row["n_users"], row["n_differ"]) == (4, 3)
    assert row["p"] == row["p_holm"] == 2 / 8
    assert 0 <= row["difference_low"] < row["difference"] < row["difference_high"]
    assert not row["is_shown"]
    assert row["user_metrics_version"] == "m"
    # (2.80159 · 0.2394 / 0.3125)^2 = 4.6
    assert row["users_needed"] == 5


def test_holm_counts_a_pair_once_and_goes_over_all_protocols() -> None:
    given = {SFT: [1.0] * 6, POPULAR: [0.0] * 6}
    one = comparisons(scores(given), RECIPE, 0, "m")
    # popularity is the best classical row too: two reasons, one pair
    assert one["reason"].tolist() == ["best classical", "popularity"]
    assert one["n_comparisons"].tolist() == [1, 1]
    assert one["p"].tolist() == one["p_holm"].tolist() == [2 / 64] * 2
    assert one["is_shown"].all()
    both = comparisons(pd.concat([scores(given), scores(given, "temporal")]), RECIPE, 0, "m")
    assert both["n_comparisons"].tolist() == [2] * 4
    assert both["p_holm"].tolist() == [4 / 64] * 4
    assert not both["is_shown"].any()


def test_no_hit_anywhere_has_a_bound_and_nothing_to_see() -> None:
    table = comparisons(scores({BASE: [0] * 50, SFT: [0] * 50}), RECIPE, 0, "m")
    bound = 1 - 0.025 ** (1 / 50)
    assert table["difference_low"].item() == pytest.approx(-bound)
    assert table["difference_high"].item() == pytest.approx(bound)
    assert table["p"].item() == 1
    assert table["users_needed"].isna().all()


def test_other_users_are_refused_and_nothing_is_a_table() -> None:
    uneven = scores({BASE: [0] * 3, SFT: [0] * 2})
    with pytest.raises(DataError, match="different users"):
        comparisons(uneven, RECIPE, 0, "m")
    empty = comparisons(scores({}), RECIPE, 0, "m")
    conform(empty, COMPARISONS, "comparisons")
    assert empty.empty


def test_the_metric_table_carries_the_p_values_of_its_difference() -> None:
    metrics = scores({BASE: [0] * 6, SFT: [1.0] * 6, POPULAR: [0.5] * 6})
    compared = comparisons(metrics, RECIPE, 0, "m")
    table = metric_table(metrics, RECIPE, 0, 5, comparisons=compared)
    sft = table[table["stage"] == "sft"].iloc[0]
    other = compared[compared["reason"] == "predecessor"].iloc[0]
    for name in ("", "_low", "_high"):
        assert sft[f"ndcg_difference{name}"] == pytest.approx(other[f"difference{name}"])
    assert (sft["ndcg_difference_p"], sft["ndcg_difference_p_holm"]) == (
        other["p"],
        other["p_holm"],
    )
    assert table.loc[table["stage"] != "sft", "ndcg_difference_p"].isna().all()
    assert metric_table(metrics, RECIPE, 0, 5)["ndcg_difference_p"].isna().all()


def test_thirty_rows_of_450_users_take_seconds() -> None:
    rng = np.random.default_rng(0)
    rows = [(s, d, "prompt") for s in ("base", "sft", "dpo", "rlhf")
            for d in ("free", "constrained", "ranked")]  # fmt: skip
    rows += [(f"model {i}", "ranking", s) for i in range(8) for s in ("prompt", "history")]
    rows += [POPULAR, KNOWING]
    metrics = scores({row: (rng.random(450) * (rng.random(450) < 0.1)).tolist() for row in rows})
    started = time.process_time()
    table = comparisons(metrics, EvaluationRecipe(), 0, "m")
    seconds = time.process_time() - started
    print(f"{table['n_comparisons'].iloc[0]} comparisons: {seconds:.1f} s")
    assert seconds < 15  # about 2 on a quiet machine
