"""Measures beyond accuracy, each by hand, and the table of two small recommenders."""

from __future__ import annotations

from math import log2

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec_assets.ground.beyond import (
    beyond_accuracy,
    film_genres,
    genre_distribution,
    intra_list_diversity,
    miscalibration,
    popularity_percentiles,
    self_information,
    training_popularity,
)
from llmrec_assets.ground.recommendations import recommendation_frame
from llmrec_assets.ground.schemas import BEYOND_ACCURACY
from llmrec_assets.ground.tables import conform

#: films 1 to 4; 11 is film 1 under a second id; film 4 has no genre
MOVIES = pd.DataFrame(
    {
        "movie_id": [1, 2, 3, 4, 11],
        "canonical_movie_id": [1, 2, 3, 4, 1],
        "title": ["A", "B", "C", "D", "A"],
        "genres": [["Drama"], ["Drama", "War"], ["Comedy"], [], ["War"]],
    }
)
#: training users 1 to 3; test user 9, who liked film 2 and disliked film 4 by time 100
RATINGS = pd.DataFrame(
    [
        (1, 1, 5, 10), (1, 11, 5, 11), (2, 11, 1, 10), (3, 1, 4, 10), (1, 2, 4, 12),
        (9, 2, 4, 90), (9, 4, 1, 100), (9, 1, 5, 101),
    ],
    columns=["user_id", "movie_id", "rating", "timestamp"],
)  # fmt: skip
SPLITS = pd.DataFrame({"user_id": [1, 2, 3, 9], "split": ["train"] * 3 + ["test"]})
PROMPTS = pd.DataFrame(
    {"user_id": [9, 9], "window_index": [0, 1], "cutoff_timestamp": [100, 100],
     "ground_truth_movie_ids": [[1], [1]]}
)  # fmt: skip
GENRES = film_genres(MOVIES)


def lists(by_window: dict[int, list], stage: str, decoding: str = "free") -> pd.DataFrame:
    """A slot is a film, None, or (film, mark)."""
    rows = []
    for window, slots in by_window.items():
        for rank, slot in enumerate(slots, start=1):
            film, mark = slot if isinstance(slot, tuple) else (slot, "")
            rows.append(
                (9, window, stage, decoding, "prompt", rank, film and str(film), film,
                 "exact" if film else "missing", None, mark == "duplicate", mark == "seen",
                 "p", "c", "a")
            )  # fmt: skip
    return recommendation_frame(rows).assign(recommendations_version=f"r-{stage}")


def test_popularity_counts_training_users_once_a_film() -> None:
    assert training_popularity(RATINGS, SPLITS, MOVIES) == {1: 3, 2: 1, 3: 0, 4: 0}


def test_popularity_of_the_temporal_protocol_ends_at_its_time() -> None:
    dated = RATINGS.assign(timestamp=range(len(RATINGS)))
    train = dated[dated["user_id"] < 9]
    last = int(train["timestamp"].max())
    whole = training_popularity(dated, SPLITS, MOVIES, last)
    assert whole == training_popularity(RATINGS, SPLITS, MOVIES)
    assert sum(training_popularity(dated, SPLITS, MOVIES, last - 1).values()) < sum(whole.values())
    assert set(training_popularity(dated, SPLITS, MOVIES, -1).values()) == {0}


def test_self_information_and_percentiles_by_hand() -> None:
    information = self_information({1: 3, 2: 1, 3: 0, 4: 0}, n_users=3)
    assert information == {1: 0.0, 2: 1.0, 3: 2.0, 4: 2.0}
    percentiles = popularity_percentiles({1: 3, 2: 1, 3: 0, 4: 0})
    assert percentiles == {1: 1.0, 2: 2 / 3, 3: pytest.approx(1 / 6), 4: pytest.approx(1 / 6)}
    assert popularity_percentiles({7: 3}) == {7: 0.5}


def test_genres_are_the_canonical_films() -> None:
    assert {1: {"Drama"}, 2: {"Drama", "War"}, 3: {"Comedy"}, 4: frozenset()} == GENRES


def test_diversity_by_hand() -> None:
    assert intra_list_diversity([1, 2, 3], GENRES) == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert intra_list_diversity([4, 4], GENRES) == 0
    assert intra_list_diversity([1, 4], GENRES) == 1
    assert intra_list_diversity([1], GENRES) is None


def test_miscalibration_by_hand() -> None:
    liked = genre_distribution([2], GENRES)
    assert liked == {"Drama": 0.5, "War": 0.5}
    assert miscalibration(liked, [2], GENRES) == 0
    assert miscalibration(liked, [3], GENRES) == 1  # nothing in common
    # p = (1/2, 1/2), q = (1, 0), middle (3/4, 1/4)
    expected = (0.5 * log2(2 / 3) + 0.5 * log2(2) + 1 * log2(4 / 3)) / 2
    assert miscalibration(liked, [1], GENRES) == pytest.approx(expected)
    assert miscalibration(liked, [4], GENRES) is None
    assert miscalibration({}, [1], GENRES) is None


FILMS = st.lists(st.sampled_from([1, 2, 3, 4]), max_size=5)


@given(FILMS, FILMS)
def test_measures_stay_in_their_range_and_divergence_is_symmetric(first, second) -> None:
    one, other = genre_distribution(first, GENRES), genre_distribution(second, GENRES)
    assert sum(one.values()) == pytest.approx(1 if one else 0)
    there, back = miscalibration(one, second, GENRES), miscalibration(other, first, GENRES)
    assert there == (None if back is None else pytest.approx(back, abs=1e-12))
    for value in (there, intra_list_diversity(first, GENRES)):
        assert value is None or -1e-12 <= value <= 1 + 1e-12


def test_the_table_by_hand() -> None:
    recommended = pd.concat(
        [
            # a window without a valid slot weighs in nothing but `valid`
            lists({0: [1, (1, "duplicate"), 3, None], 1: [(2, "seen"), None, None, None]}, "sft"),
            lists({0: [1, 2, 3, 4], 1: [3, 4, 1, 2]}, "apex", "ranking"),
        ]
    )
    responses = pd.DataFrame(
        {"user_id": [9, 9], "stage": "sft", "decoding": "free", "n_prompt_tokens": [100, 50],
         "n_response_tokens": [30, 10]}
    )  # fmt: skip
    table = beyond_accuracy(recommended, PROMPTS, RATINGS, SPLITS, MOVIES, responses, liked_min=3)
    conform(table, BEYOND_ACCURACY, "beyond_accuracy")
    sft, apex = table.to_dict("records")
    assert (sft["recommendations_version"], apex["recommendations_version"]) == ("r-sft", "r-apex")
    assert (sft["stage"], apex["stage"]) == ("sft", "apex")
    assert (sft["k"], sft["n_windows"], sft["valid"]) == (4, 2, (2 / 4 + 0) / 2)
    assert (sft["n_films"], sft["coverage"]) == (2, 2 / 4)
    assert sft["novelty"] == (0 + 2) / 2
    assert sft["popularity"] == pytest.approx((1 + 1 / 6) / 2)
    assert sft["diversity"] == 1
    # liked by the cut-off: film 2 (film 4 was disliked, film 1 came later); listed: 1 and 3
    half = {"Drama": 0.5, "War": 0.5}
    assert sft["miscalibration"] == pytest.approx(miscalibration(half, [1, 3], GENRES))
    # one user, two windows
    assert (sft["prompt_tokens"], sft["response_tokens"]) == (150, 40)
    assert (apex["valid"], apex["coverage"], apex["novelty"]) == (1, 1, 5 / 4)
    assert pd.isna(apex["response_tokens"])


def test_lists_without_a_valid_slot_have_no_means_and_nothing_is_a_table() -> None:
    none = lists({0: [None, None]}, "sft")
    (row,) = beyond_accuracy(none, PROMPTS, RATINGS, SPLITS, MOVIES, None, 3).to_dict("records")
    assert (row["valid"], row["coverage"]) == (0, 0)
    assert all(pd.isna(row[name]) for name in ("novelty", "diversity", "miscalibration"))
    empty = beyond_accuracy(none.iloc[:0], PROMPTS, RATINGS, SPLITS, MOVIES, None, 3)
    conform(empty, BEYOND_ACCURACY, "beyond_accuracy")
