"""SASRec learns an order, looks only back, and has liked films alone as targets."""

from __future__ import annotations

from itertools import count

import numpy as np
import pandas as pd
import pytest
import torch

from llmrec_assets.ground.recipes import SasrecRecipe
from llmrec_assets.ground.recommender import Window
from llmrec_assets.models.sasrec import SasRec, SasRecScorer

FILMS = list(range(12))
RECIPE = SasrecRecipe(
    embedding_size=16, blocks=1, max_length=6, dropout=0.0, batch_size=16, learning_rate=1e-2
)


def cycles(rating: int = 5) -> pd.DataFrame:
    """Every user goes round the films in one order, from a film of their own."""
    rows = [(user, (user + step) % 12, rating, step) for user in range(12) for step in range(15)]
    return pd.DataFrame(rows, columns=["user_id", "film", "rating", "timestamp"])


def window(*films: int) -> Window:
    return Window(99, 0, 0, films, (True,) * len(films), frozenset(films))


def test_it_learns_which_film_follows() -> None:
    scorer = SasRecScorer(cycles(), FILMS, RECIPE, liked_min=3, seed=0)
    first = scorer.train(5)
    assert first == pytest.approx(np.log(12), abs=0.5)  # knows nothing yet
    scorer.train(100)
    scores = scorer.scores([window(3), window(8, 9), window(*range(10))])
    assert scores.argmax(axis=1).tolist() == [4, 10, 10]


def test_a_position_sees_nothing_of_what_follows() -> None:
    torch.manual_seed(0)
    model = SasRec(12, RECIPE).eval()
    films, liked = torch.tensor([[1, 2, 3, 4], [1, 2, 7, 8]]), torch.ones(2, 4, dtype=torch.long)
    hidden = model(films, liked)
    assert torch.equal(hidden[0, :2], hidden[1, :2])
    assert not torch.allclose(hidden[0, 2], hidden[1, 2])


def test_a_disliked_film_is_no_target_and_its_mark_is_seen() -> None:
    nothing_liked = SasRecScorer(cycles(rating=1), FILMS, RECIPE, liked_min=3, seed=0)
    assert np.isnan(nothing_liked.train(3))  # and it returns
    scorer = SasRecScorer(cycles(), FILMS, RECIPE, liked_min=3, seed=0)
    disliked = Window(99, 0, 0, (3,), (False,), frozenset())
    liked_scores, disliked_scores = scorer.scores([window(3), disliked])
    assert not np.allclose(liked_scores, disliked_scores)


def test_chunks_hold_every_step_of_a_user_once() -> None:
    scorer = SasRecScorer(cycles(), FILMS, RECIPE, liked_min=3, seed=0)
    films, liked = scorer._sequences[0]
    for _ in range(5):
        chunks = list(scorer._cut(films, liked))
        assert torch.cat([chunk for chunk, _, _ in chunks]).tolist() == films[:-1].tolist()
        assert torch.cat([target for _, _, target in chunks]).tolist() == films[1:].tolist()
        assert max(len(chunk) for chunk, _, _ in chunks) <= RECIPE.max_length


def test_training_in_steps_is_training_at_once() -> None:
    dropout = RECIPE.model_copy(update={"dropout": 0.3})
    at_once, in_steps = (
        SasRecScorer(cycles(), FILMS, dropout, liked_min=3, seed=4) for _ in range(2)
    )
    at_once.train(6)
    for step in count(1):
        in_steps.train(1)
        in_steps.scores([window(step % 12)])
        torch.rand(1)  # the process's own random numbers change nothing
        if step == 6:
            break
    np.testing.assert_array_equal(at_once.scores([window(3)]), in_steps.scores([window(3)]))
