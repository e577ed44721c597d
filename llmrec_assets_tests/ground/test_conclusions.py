"""What is said follows from the numbers, and nothing is claimed that they do not show."""

from __future__ import annotations

import pandas as pd
import pytest
from test_report_page import POPULAR, comparisons, metric_table, pair, popularity, row

from llmrec_assets.ground.conclusions import comparison_words, forest_words, verdict


def told(*pairs: dict, rows: tuple = ()) -> str:
    table = metric_table(row("base"), row("sft"), popularity(0.045), *rows)
    return verdict(table, comparisons(*pairs))


def test_no_row_beats_popularity_unless_its_corrected_p_value_says_so() -> None:
    def against(base: tuple, sft: tuple) -> str:
        return told(*(pair(s, POPULAR, d, p, "popularity")
                      for s, (d, p) in (("base", base), ("sft", sft))))  # fmt: skip

    name = "popularity, 4.50 % NDCG"
    both = against((-0.04, 0.001), (0.01, 0.051))
    assert f"No LLM row is shown to beat {name}. Shown to be worse than it: base." in both
    assert "For 1 row neither is shown." in both
    assert f"Shown to beat {name}: sft. Shown to be worse than it: base." in against(
        (-0.04, 0.001), (0.01, 0.05)
    )
    nothing = against((-0.01, 0.9), (0.5, 0.06))
    assert f"No LLM row is shown to beat {name}. For 2 rows neither is shown." in nothing


def test_each_popularity_list_is_a_bar_of_its_own() -> None:
    other = ("popularity", "ranking", "prompt")
    text = told(
        pair("sft", POPULAR, -0.02, 0.01, "popularity"),
        pair("sft", other, 0.02, 0.01, "popularity"),
        rows=(popularity(0.03) | {"information_set": "prompt"},),
    )
    assert "No LLM row is shown to beat popularity (ranking, history), 4.50 % NDCG." in text
    assert "Shown to beat popularity (ranking, prompt), 3.00 % NDCG: sft." in text


@pytest.mark.parametrize(
    ("difference", "p", "says"),
    [
        (0.01, 0.05, "Shown to be better than the stage they were trained from: sft."),
        (-0.01, 0.05, "Shown to be worse than the stage they were trained from: sft."),
        (0.01, 0.051, "No row is shown to be better or worse than the stage they were trained"),
    ],
)
def test_training_made_a_difference_only_where_it_is_shown(difference, p, says) -> None:
    assert says in told(pair("sft", "base", difference, p))


def test_the_best_classical_row_is_a_bar_for_the_models_alone() -> None:
    knn = ("itemknn", "ranking", "prompt")
    text = told(
        pair("sft", knn, -0.08, 0.001, "best classical"),
        pair("base", knn, -0.01, 0.2, "best classical"),
        pair("popularity", knn, -0.08, 0.001, "best classical"),
    )
    assert "Shown to be worse than the best classical row: sft. For 1 row no difference" in text


def test_without_popularity_or_models_or_rows_nothing_is_claimed() -> None:
    assert "whether the LLM beats it cannot be said" in verdict(
        metric_table(row("sft")), comparisons()
    )
    assert "No LLM stage is in the table." in verdict(metric_table(popularity(0.05)), comparisons())
    assert "Nothing was compared to popularity" in told()
    assert "nothing can be said" in verdict(metric_table(), comparisons())


def test_the_forests_words_count_rows_beside_the_line() -> None:
    rows = [row("base", (0.01, 0, 0.02)), row("sft", (0.05, 0.04, 0.06)),
            row("dpo", (0.08, 0.05, 0.1)), popularity(0.045)]  # fmt: skip
    words = forest_words(metric_table(*rows))
    assert "Of 3 rows of the LLM, 1 have an NDCG@5 interval wholly above" in words
    assert "1 wholly below it, 1 hold it." in words
    assert words.startswith("Of") and not forest_words(metric_table(rows[0])).startswith("Of")


def test_the_comparisons_words_count_pairs_once_and_tell_the_power() -> None:
    pairs = comparisons(
        pair("sft", POPULAR, 0.04, 0.01, "popularity"),
        pair("sft", POPULAR, 0.04, 0.01, "best classical"),
        pair("base", POPULAR, 0.01, 0.08, "popularity", users_needed=300),
        pair("dpo", "sft", 0.001, 1.0, users_needed=20_000),
        pair("rlhf", "sft", 0.01, 0.9, users_needed=90),
    )
    words = comparison_words(pairs, 0.95)
    assert words.startswith("1 of 4 differences are shown at the level 0.05, after Holm's")
    assert "1 would have been called significant by themselves" in words
    assert "a median of 300 users" in words
    assert "there are 100, too few for 2 of the 3 that are not shown" in words
    assert "Missing" in comparison_words(comparisons(), 0.95)
    assert "not shown" not in comparison_words(pairs.head(1), 0.95)
    assert isinstance(pairs, pd.DataFrame)
