"""LensKit's recommenders on bare histories: against the formulas of their papers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch

from llmrec_assets.ground.leave_last_out import Floats, Ints
from llmrec_assets.ground.recipes import EvaluationRecipe, LeaveLastOutRecipe
from llmrec_assets.models.leave_last_out import classical_candidates, classical_leave_last_out

#: films 0 to 4; nobody met film 5 in training
HISTORIES = [np.array(films) for films in ([0, 1, 2], [0, 1], [1, 2, 3], [4, 0], [3], [2, 3])]
N_ITEMS = 6
ASKED = [np.array([0]), np.array([3, 2]), np.array([5, 1])]
RECIPE = LeaveLastOutRecipe(knn_neighbours=(10,), ease_regularization=(2.0,))


def _scores(
    recommender: str, asked: Sequence[Ints] = ASKED, recipe: LeaveLastOutRecipe = RECIPE
) -> Floats:
    (candidate,) = [c for c in classical_candidates(recipe) if c.recommender == recommender]
    return candidate.fit(HISTORIES, N_ITEMS)(asked)


def _matrix(histories: Sequence[Ints]) -> Floats:
    matrix = np.zeros((len(histories), N_ITEMS))
    for row, films in enumerate(histories):
        matrix[row, films] = 1
    return matrix


def test_popularity_counts_users() -> None:
    assert _scores("popularity").tolist() == [[3, 3, 3, 3, 1, 0]] * 3


def test_ease_is_its_closed_form() -> None:
    x = _matrix(HISTORIES)
    inverse = np.linalg.inv(x.T @ x + 2.0 * np.eye(N_ITEMS))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    np.testing.assert_allclose(_scores("ease"), _matrix(ASKED) @ weights, atol=1e-5)


def test_item_knn_sums_cosine_similarities() -> None:
    x = _matrix(HISTORIES)
    norms = np.maximum(np.linalg.norm(x, axis=0), 1e-9)
    cosine = (x.T @ x) / np.outer(norms, norms)
    np.fill_diagonal(cosine, 0)
    expected = _matrix(ASKED) @ cosine
    found = _scores("itemknn")
    # no similar film in the history: no opinion
    np.testing.assert_array_equal(np.isnan(found), expected == 0)
    np.testing.assert_allclose(np.nan_to_num(found), expected, atol=1e-5)


def test_item_knn_with_one_neighbour_takes_each_films_nearest() -> None:
    """Film 4 stands with film 0 only; film 0 stands nearer to film 1 than to films 2 and 4."""
    one = RECIPE.model_copy(update={"knn_neighbours": (1,)})
    found = _scores("itemknn", [np.array([4]), np.array([0]), np.array([4, 0])], one)
    by_film_4, by_film_0 = 1 / np.sqrt(3), 2 / 3
    assert np.nan_to_num(found) == pytest.approx(
        np.array([[by_film_4, 0, 0, 0, 0, 0], [0, by_film_0, 0, 0, 0, 0],
                  [by_film_4, by_film_0, 0, 0, 0, 0]])
    )  # fmt: skip


@pytest.mark.parametrize("recommender", ["popularity", "itemknn", "ease"])
def test_scores_of_a_user_do_not_depend_on_company_or_on_a_second_fit(recommender: str) -> None:
    together = _scores(recommender)
    for row, films in enumerate(ASKED):
        np.testing.assert_allclose(_scores(recommender, [films]), together[[row]], atol=1e-6)


def test_taste_beats_popularity_where_there_is_taste() -> None:
    """Two groups of users, each of which keeps to its own 15 films."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(60):
        films = rng.permutation(15)[:12] + (0 if user % 3 else 15)
        rows += [(user, film, time) for time, film in enumerate(films)]
    ratings = pd.DataFrame(rows, columns=["user_id", "movie_id", "timestamp"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result, share_tied = classical_leave_last_out(
            ratings, None, RECIPE, EvaluationRecipe(resamples=200), seed=1
        )
        assert torch.get_num_threads() == 1  # LensKit would leave its own number
    finally:
        torch.set_num_threads(threads)
    table = result.frame
    assert share_tied == 0
    assert table["recommender"].unique().tolist() == ["popularity", "itemknn", "ease"]
    assert table["k"].tolist() == [5, 10] * 3
    at_5 = table[table["k"] == 5].set_index("recommender")
    # each user has 4 unmet films of the own group (3 and the target): a recommender that knows the
    # group has the target among its first 5; popularity lists the larger group to everyone
    assert at_5.loc["ease", "hr"] == at_5.loc["itemknn", "hr"] == 1.0
    assert at_5.loc["popularity", "hr"] < 0.75
