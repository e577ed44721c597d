"""What a fit may see, and that a planted event of anyone else is found."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec_assets.ground.fits import (
    FitRecord,
    fit_problems,
    fit_record,
    grid_point,
    time_grid,
    training_events,
)

MOVIES = pd.DataFrame({"movie_id": [1, 2, 14], "canonical_movie_id": [1, 2, 1]})
SPLITS = pd.DataFrame({"user_id": [1, 2, 3, 4], "split": ["train", "train", "validation", "test"]})
RATINGS = pd.DataFrame(
    [(2, 14, 4, 7), (1, 2, 5, 9), (1, 1, 3, 9), (1, 14, 2, 5), (3, 1, 5, 1), (4, 2, 5, 2)],
    columns=["user_id", "movie_id", "rating", "timestamp"],
)
CUTOFF_OF = {(4, 0): 8}


def problems(*records: FitRecord, tuned_on: tuple[int, ...] = (3,)) -> list[str]:
    return fit_problems(records, tuned_on, RATINGS, SPLITS, MOVIES, CUTOFF_OF)


def record(until: int | None = None, extra: tuple[int, int, int, int] | None = None) -> FitRecord:
    events = training_events(RATINGS, SPLITS, MOVIES, until)
    if extra is not None:
        events.loc[len(events)] = list(extra)
    return fit_record("ease", events, until, [(4, 0)])


def test_training_events_are_the_training_users_in_order_of_time() -> None:
    events = training_events(RATINGS, SPLITS, MOVIES)
    assert events.to_numpy().tolist() == [[1, 1, 2, 5], [1, 1, 3, 9], [1, 2, 5, 9], [2, 1, 4, 7]]
    assert training_events(RATINGS, SPLITS, MOVIES, 7)["timestamp"].tolist() == [5, 7]


def test_honest_fits_have_no_problem() -> None:
    assert problems(record(), record(7), record(0)) == []


@pytest.mark.parametrize(
    ("planted", "problem"),
    [
        (record(extra=(4, 2, 5, 2)), "ease: user 4 took part in the fit, their split is test"),
        (
            record(extra=(3, 1, 5, 1)),
            "ease: user 3 took part in the fit, their split is validation",
        ),
        (record(7, extra=(1, 2, 5, 9)), "ease, fitted up to 7: an event of 9 took part"),
        (record(extra=(1, 2, 5, 9)), "ease: 5 events took part, training users have 4"),
        (
            replace(record(7), until=9),
            "ease, fitted up to 9: 2 events took part, training users have 4",
        ),
        (
            replace(record(9), answered=((4, 0),)),
            "ease, fitted up to 9: answered user 4, window 0, whose cut-off is 8",
        ),
        (
            fit_record("ease", training_events(RATINGS, SPLITS, MOVIES).assign(rating=5), None, []),
            "ease: its events are not those of the training users",
        ),
    ],
)
def test_a_planted_event_is_found(planted: FitRecord, problem: str) -> None:
    assert problem in problems(planted)


def test_test_users_may_not_choose_hyperparameters() -> None:
    assert problems(record(), tuned_on=(3, 4)) == [
        "user 4 chose hyperparameters, their split is test"
    ]


def test_time_grid_by_hand() -> None:
    assert time_grid([40, 10, 20, 30], 2) == [10, 30]
    assert time_grid([40, 10, 20, 30], 9) == [10, 20, 30, 40]
    assert time_grid([], 3) == []
    assert [grid_point([10, 30], cutoff) for cutoff in (10, 29, 30, 99)] == [10, 10, 30, 30]
    with pytest.raises(ValueError, match="no grid point at or before 9"):
        grid_point([10, 30], 9)


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 6))
def test_every_cutoff_has_a_grid_point_that_is_not_later(cutoffs: list[int], points: int) -> None:
    grid = time_grid(cutoffs, points)
    assert len(grid) <= points
    assert all(grid_point(grid, cutoff) <= cutoff for cutoff in cutoffs)
