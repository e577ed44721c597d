"""The check counts again: it passes what is right, and names each planted fault."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from test_evaluation import LISTS, MOVIES, _prompts, _recommendations

from llmrec_assets.ground import evaluation
from llmrec_assets.ground.score_checks import score_problems

RATINGS = ["user_id", "movie_id", "timestamp"]


def problems(lists: pd.DataFrame, prompts: pd.DataFrame, ratings: list, k: int, **changes):
    metrics = evaluation.user_metrics(lists, prompts, MOVIES).assign(**changes)
    rated = pd.DataFrame(ratings, columns=RATINGS)
    return score_problems(metrics, lists, prompts, rated, MOVIES, k)


PROMPTS = _prompts({(1, 0): [11, 2], (2, 0): [3]})
#: user 2 had rated film 5 by the cut-off at 100, and film 3 after it
RATED = [(2, 5, 100), (2, 3, 101)]
LISTED = _recommendations({(1, 0): [4, 1, 1], (2, 0): [3, None, 5]})
SEEN_5 = LISTED.assign(is_seen=[False] * 5 + [True])


def test_what_is_right_passes() -> None:
    assert problems(SEEN_5, PROMPTS, RATED, 3) == []


@given(LISTS)
@settings(max_examples=30, deadline=None)
def test_whatever_is_scored_right_passes(lists) -> None:
    prompts = _prompts({(user, 0): sorted(truth) for user, (_, truth) in enumerate(lists)})
    table = _recommendations({(user, 0): ids for user, (ids, _) in enumerate(lists)})
    assert problems(table, prompts, [], 4) == []


def test_an_evaluation_on_seen_items_is_named() -> None:
    """The ground truth is a film of the history, and the list's mark for seen films is gone."""
    seen_truth = _prompts({(1, 0): [11, 2], (2, 0): [5]})
    told = problems(LISTED, seen_truth, RATED, 3)
    where = "base (free, prompt), user 2, window 0: "
    assert where + "film 5 at rank 3 was rated by the cut-off, not marked seen" in told
    assert f"{where}its ground truth [5] was rated by the cut-off: a hit would be seen" in told
    assert f"{where}hits is 1, counted again it is 0" in told
    assert all(line.startswith(where) for line in told)
    # under its second id it is the same film
    other_id = _prompts({(1, 0): [11], (2, 0): [3]})
    told = problems(SEEN_5, other_id, [*RATED, (1, 1, 3)], 3)
    assert any("user 1, window 0: its ground truth [1] was rated" in line for line in told)


def test_a_shifted_k_is_named() -> None:
    longer = problems(SEEN_5, PROMPTS, RATED, 2)
    assert (
        "base (free, prompt), user 1, window 0: has 3 slots, expected the ranks 1 to 2"
        in (longer[0])
    )
    shorter = problems(SEEN_5[SEEN_5["rank"] < 3], PROMPTS, RATED, 3)
    assert any("has 2 slots" in line for line in shorter)
    # precision over another k than the slots there are
    assert any("precision is" in line for line in shorter)


@pytest.mark.parametrize("name", ["hits", "ndcg", "precision", "recall", "n_ground_truth"])
def test_every_number_is_held_against(name: str) -> None:
    metrics = evaluation.user_metrics(SEEN_5, PROMPTS, MOVIES)
    told = problems(SEEN_5, PROMPTS, RATED, 3, **{name: metrics[name] + 1e-8})
    assert len(told) == 2 and all(f" {name} is " in line for line in told)


def test_marks_of_films_that_are_neither_seen_nor_repeated_are_named() -> None:
    wrong = problems(SEEN_5.assign(is_seen=True), PROMPTS, RATED, 3)
    assert any("film 4 at rank 1 is marked as seen, but was not rated" in line for line in wrong)
    unmarked = problems(SEEN_5.assign(is_duplicate=False), PROMPTS, RATED, 3)
    assert any("film 1 at rank 3 is wrongly marked as repeated or not" in t for t in unmarked)


def test_a_film_under_its_other_id_is_named() -> None:
    told = problems(SEEN_5.assign(movie_id=[4, 11, 11, 3, None, 5]), PROMPTS, RATED, 3)
    assert told[0] == "recommendations: film 11 is no canonical film of the catalogue"


def test_a_list_that_is_scored_twice_or_not_at_all_is_named() -> None:
    metrics = evaluation.user_metrics(SEEN_5, PROMPTS, MOVIES)
    rated = pd.DataFrame(RATED, columns=RATINGS)
    twice = pd.concat([metrics, metrics.iloc[:1]])
    (told,) = score_problems(twice, SEEN_5, PROMPTS, rated, MOVIES, 3)
    assert told == "base (free, prompt), user 1, window 0: is scored twice"
    (told,) = score_problems(metrics.iloc[1:], SEEN_5, PROMPTS, rated, MOVIES, 3)
    assert told == "base (free, prompt), user 1, window 0: is not scored"
    told = score_problems(metrics, SEEN_5.iloc[:3], PROMPTS, rated, MOVIES, 3)
    assert "without a prompt or without a list" in told[0]
