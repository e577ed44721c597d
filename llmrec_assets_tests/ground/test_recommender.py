"""What a recommender is told of a window, and whether lists keep the contract."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec_assets.ground.recommender import (
    Window,
    contract_problems,
    recommended_frame,
    windows_of,
)

MOVIES = pd.DataFrame({"movie_id": [1, 2, 3, 4, 14], "canonical_movie_id": [1, 2, 3, 4, 4]})
RATINGS = pd.DataFrame(
    [
        (9, 3, 5, 20), (9, 14, 4, 10), (9, 1, 2, 10), (9, 2, 5, 30),
        (8, 1, 5, 10),
    ],
    columns=["user_id", "movie_id", "rating", "timestamp"],
)  # fmt: skip
PROMPTS = pd.DataFrame(
    {
        "user_id": [9],
        "window_index": [0],
        "cutoff_timestamp": [20],
        "context_movie_ids": [[14, 3]],
    }
)
SEEN = {(9, 0): frozenset({1, 3, 4})}
CATALOGUE = {1, 2, 3, 4, 5, 6, 7}


def told(information_set: str, **options: int) -> Window:
    (window,) = windows_of(
        PROMPTS, RATINGS, MOVIES, SEEN, information_set=information_set, liked_min=3, **options
    )
    return window


def test_history_is_all_up_to_the_cutoff_and_prompt_is_what_it_shows() -> None:
    # in the window's order: time, then movie id; film 14 is film 4, film 2 comes later
    assert told("history") == Window(9, 0, 20, (1, 4, 3), (False, True, True), SEEN[9, 0])
    assert told("prompt") == Window(9, 0, 20, (4, 3), (True, True), SEEN[9, 0])
    # a template that names one liked film names the last
    assert told("prompt", shown_per_class=1).films == (3,)
    with pytest.raises(ValueError, match="'future' is none of"):
        told("future")


def test_evidence_is_distinct_and_cut_before_it_is_chosen() -> None:
    window = Window(9, 0, 20, (1, 4, 1, 3), (True, False, True, False), frozenset())
    assert window.evidence(only_liked=False) == [1, 4, 3]
    assert window.evidence(only_liked=True) == [1]
    assert window.evidence(only_liked=True, last=1) == []
    assert window.evidence(only_liked=False, last=2) == [1, 3]


def lists(films: list[int], top_k: int = 3) -> pd.DataFrame:
    window = Window(9, 0, 20, (), (), frozenset())
    return recommended_frame(
        [window],
        [films],
        SEEN,
        {},
        stage="ease",
        decoding="ranking",
        information_set="prompt",
        top_k=top_k,
        prompts_version="p",
    )


def problems(frame: pd.DataFrame, top_k: int = 3) -> list[str]:
    return contract_problems(frame, SEEN, CATALOGUE, top_k)


def test_a_list_that_keeps_the_contract() -> None:
    assert problems(lists([2, 5, 7])) == []
    # four films are left: the fifth slot may be empty, the fourth may not
    assert problems(lists([2, 5, 7, 6], 5), 5) == []
    assert "3 films, expected 4" in problems(lists([2, 5, 7], 5), 5)[0]


@pytest.mark.parametrize(
    ("films", "problem"),
    [
        ([2, 5, 5], "film 5 is repeated"),
        ([2, 5, 14], "film 14 is in the catalogue under no canonical id"),
        ([2, 5, 3], "film 3 is already seen"),
        ([2, 5], "2 films, expected 3"),
    ],
)
def test_each_breach_is_named(films: list[int], problem: str) -> None:
    (found,) = problems(lists(films))
    assert found == f"ease (ranking, prompt), user 9, window 0: {problem}"


def test_a_shifted_k_a_lost_rank_and_a_hole_are_breaches() -> None:
    frame = lists([2, 5, 7])
    assert "its ranks are [1, 2, 3], expected 1 to 2" in problems(frame, 2)[0]
    assert "its ranks are [1, 2, 3], expected 1 to 5" in problems(frame, 5)[0]
    shifted = frame.assign(rank=frame["rank"] - 1)
    assert "its ranks are [0, 1, 2]" in problems(shifted)[0]
    assert "its ranks are [1, 3]" in problems(frame.drop(index=1))[0]
    hole = frame.assign(movie_id=pd.array([2, None, 7], dtype="Int32"))
    assert "an empty slot stands before a film" in problems(hole)[0]
    assert "no such window" in problems(frame.assign(user_id=7))[0]


@given(st.lists(st.integers(0, 9), max_size=3))
def test_no_problem_is_found_exactly_where_the_contract_holds(films: list[int]) -> None:
    keeps = len(films) == 3 and len(set(films)) == 3 and set(films) <= CATALOGUE - SEEN[9, 0]
    assert (problems(lists(films)) == []) == keeps
