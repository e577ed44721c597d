"""Leave-last-out by hand: the split, ranks with ties, HR and NDCG, and the choice of a setting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.leave_last_out import (
    Candidate,
    Floats,
    Ints,
    LeaveLastOut,
    Scorer,
    expected_hit_rate,
    expected_ndcg,
    leave_last_out,
    leave_last_out_table,
    target_ranks,
)
from llmrec_assets.ground.recipes import EvaluationRecipe, LeaveLastOutRecipe
from llmrec_assets.ground.schemas import LEAVE_LAST_OUT

EVALUATION = EvaluationRecipe(resamples=200)
RECIPE = LeaveLastOutRecipe(min_interactions=3, ks=(2, 1))

#: film 2 stands in the catalogue again as 12
CANONICAL = pd.DataFrame({"movie_id": [1, 2, 3, 4, 12], "canonical_movie_id": [1, 2, 3, 4, 2]})


def _ratings(rows: list[tuple[int, int, int]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["user_id", "movie_id", "timestamp"]).astype(
        {"user_id": "int32", "movie_id": "int32", "timestamp": "int64"}
    )


def _films(split: LeaveLastOut, user: int) -> list[int]:
    """All of a user's films as canonical ids: training, validation, test."""
    row = split.user_ids.tolist().index(user)
    history = split.item_ids[split.histories[row]].tolist()
    return [
        *history,
        int(split.item_ids[split.validation[row]]),
        int(split.item_ids[split.test[row]]),
    ]


# -- the split --------------------------------------------------------------------------------


def test_the_last_film_is_the_test_and_the_last_but_one_the_validation_target() -> None:
    ratings = _ratings(
        [(7, 4, 30), (7, 1, 10), (7, 3, 40), (7, 12, 20), (7, 2, 50),  # film 2 again, as itself
         (5, 1, 1), (5, 2, 2), (5, 3, 3),
         (6, 1, 1), (6, 2, 2), (6, 12, 3)]  # two films only: left out
    )  # fmt: skip
    split = leave_last_out(ratings, CANONICAL, min_interactions=3)
    assert split.user_ids.tolist() == [5, 7]
    assert split.item_ids.tolist() == [1, 2, 3, 4]
    assert _films(split, 5) == [1, 2, 3]
    assert _films(split, 7) == [1, 2, 4, 3]
    assert [films.tolist() for films in split.shown_for_test()] == [[0, 1], [0, 1, 3]]
    assert split.share_tied == 0.0
    told_apart = leave_last_out(ratings, None, min_interactions=3)
    assert _films(told_apart, 7) == [1, 12, 4, 3, 2]
    assert told_apart.user_ids.tolist() == [5, 6, 7]


def test_films_that_share_a_time_are_not_ordered_by_id() -> None:
    ratings = _ratings([(u, m, 1 if m < 3 else 2) for u in range(40) for m in (1, 2, 3, 4)])
    split = leave_last_out(ratings, None, min_interactions=3)
    lasts = [_films(split, user)[-1] for user in range(40)]
    assert set(lasts) == {3, 4}
    assert 8 <= lasts.count(4) <= 32  # a fair coin is out of that once in 10,000 times
    assert split.share_tied == 1.0
    shuffled = leave_last_out(ratings.sample(frac=1, random_state=3), None, 3)
    assert [_films(shuffled, user) for user in range(40)] == [
        _films(split, user) for user in range(40)
    ]


def test_a_split_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no user has 5 ratings"):
        leave_last_out(_ratings([(1, 1, 1), (1, 2, 2)]), None)
    with pytest.raises(ValueError, match="three films make one split"):
        leave_last_out(_ratings([(1, 1, 1)]), None, min_interactions=2)


# -- ranks and metrics ------------------------------------------------------------------------


def test_ranks_by_hand() -> None:
    nan = np.nan
    scores = np.array(
        [
            [9.0, 5.0, 7.0, 5.0, 1.0],  # film 0 is known: only film 2 is better, film 3 ties
            [1.0, 1.0, 1.0, 1.0, 1.0],  # nothing is known: four tie
            [nan, 0.0, nan, -2.0, nan],  # an unscored target ties with the unscored, below all
        ]
    )
    known = [np.array([0]), np.array([], dtype=int), np.array([2])]
    better, tied = target_ranks(scores, np.array([1, 0, 4]), known)
    assert better.tolist() == [1, 0, 2]
    assert tied.tolist() == [1, 4, 1]
    with pytest.raises(ValueError, match="already knows"):
        target_ranks(scores[:1], np.array([0]), known[:1])


def test_metrics_by_hand() -> None:
    # rank 1; rank 3; rank 2 or 3; rank 5 to 7; rank 6
    better, tied = np.array([0, 2, 1, 4, 5]), np.array([0, 0, 1, 2, 0])
    assert expected_hit_rate(better, tied, 5).tolist() == [1, 1, 1, 1 / 3, 0]
    assert expected_hit_rate(better, tied, 2).tolist() == [1, 0, 0.5, 0, 0]
    discount = [1 / np.log2(rank + 1) for rank in range(1, 8)]
    assert expected_ndcg(better, tied, 5) == pytest.approx(
        [1, discount[2], (discount[1] + discount[2]) / 2, discount[4] / 3, 0], abs=1e-12
    )
    assert expected_ndcg(better, tied, 2) == pytest.approx([1, 0, discount[1] / 2, 0, 0])


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=7),
    st.integers(0, 6),
    st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_ties_are_the_mean_over_all_places_among_equals(values, target, k) -> None:
    target %= len(values)
    scores = np.array([values], dtype=float)
    better, tied = target_ranks(scores, np.array([target]), [np.array([], dtype=int)])
    ranks = [
        1 + sum(v > values[target] for v in values) + place
        for place in range(sum(v == values[target] for v in values))
    ]
    assert expected_hit_rate(better, tied, k)[0] == pytest.approx(np.mean([r <= k for r in ranks]))
    assert expected_ndcg(better, tied, k)[0] == pytest.approx(
        np.mean([1 / np.log2(r + 1) if r <= k else 0.0 for r in ranks]), abs=1e-12
    )


# -- the table --------------------------------------------------------------------------------


def _constant(scores: list[float]) -> Scorer:
    return lambda histories: np.tile(scores, (len(histories), 1))


def _candidate(name: str, setting: str, scores: list[float]) -> Candidate:
    return Candidate(name, setting, lambda histories, n_items: _constant(scores))


def _split() -> LeaveLastOut:
    """Four films; users 1 to 3 saw 0 1 2, users 4 to 6 saw 0 2 3 and user 7 saw 3 2 1."""
    seen = [[0, 1, 2]] * 3 + [[0, 2, 3]] * 3 + [[3, 2, 1]]
    rows = [(user, film, time) for user, row in enumerate(seen, 1) for time, film in enumerate(row)]
    return leave_last_out(_ratings(rows), None, min_interactions=3)


def test_the_table_by_hand() -> None:
    # validation targets: film 1 three times, film 2 four times; test: 2, 2, 2, 3, 3, 3, 1
    candidates = [
        _candidate("fixed", "good on test only", [0.0, 1.0, 2.0, 3.0]),
        _candidate("fixed", "good on validation", [0.0, 2.0, 3.0, 1.0]),
        _candidate("equal", "", [1.0] * 4),
    ]
    result = leave_last_out_table(_split(), candidates, RECIPE, EVALUATION, seed=0)
    table = result.frame
    assert table.columns.tolist() == LEAVE_LAST_OUT.names
    pa.Table.from_pandas(table, schema=LEAVE_LAST_OUT, preserve_index=False).validate(full=True)
    assert table[["recommender", "setting", "k"]].values.tolist() == [
        ["fixed", "good on validation", 1],
        ["fixed", "good on validation", 2],
        ["equal", "", 1],
        ["equal", "", 2],
    ]
    # NDCG@2 on validation. Films 1, 2, 3 are ranked for users 1 to 6; 0, 1, 2 for user 7
    second = 1 / np.log2(3)
    assert result.validation_ndcg["fixed"] == pytest.approx(
        {"good on test only": (0 + 3 * second + 1) / 7, "good on validation": (3 * second + 4) / 7}
    )
    # two films are left to each user on the test target: it is first but for users 4 to 6
    assert table["hr"].tolist() == pytest.approx([4 / 7, 1, 1 / 2, 1])
    assert table["ndcg"].tolist() == pytest.approx(
        [4 / 7, (4 + 3 * second) / 7, 1 / 2, (1 + second) / 2]
    )
    assert (table["n_users"] == 7).all() and (table["n_items"] == 4).all()
    assert table["hr_low"][0] < table["hr"][0] < table["hr_high"][0]
    assert set(result.seconds) == {"fixed", "equal"}


def test_a_scorer_is_fitted_on_training_films_and_shown_the_validation_film_for_the_test() -> None:
    fitted: list[list[int]] = []
    shown: list[list[int]] = []

    def fit(histories: Sequence[Ints], n_items: int) -> Scorer:
        fitted.extend(films.tolist() for films in histories)

        def score(histories: Sequence[Ints]) -> Floats:
            shown.extend(films.tolist() for films in histories)
            return np.zeros((len(histories), n_items))

        return score

    leave_last_out_table(_split(), [Candidate("spy", "", fit)], RECIPE, EVALUATION, 0)
    train = [[0]] * 6 + [[3]]
    assert fitted == train
    assert shown == train + [[0, 1]] * 3 + [[0, 2]] * 3 + [[3, 2]]


def test_nothing_to_compare_is_an_empty_table() -> None:
    table = leave_last_out_table(_split(), [], RECIPE, EVALUATION, 0).frame
    assert len(table) == 0 and table.columns.tolist() == LEAVE_LAST_OUT.names
