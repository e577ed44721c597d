"""Classical recommenders for leave-last-out: popularity, ItemKNN and EASE, by LensKit.

What belongs here: fitting them on bare histories. What does not: the split, the ranks and the
metrics (``ground.leave_last_out``), and the recommenders of the LLM's test windows. Another
recommender, sequential or not, joins as a further ``Candidate``: ``fit`` takes training histories
and gives back a scorer of histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from lenskit.basic import PopScorer
from lenskit.data import Dataset, DatasetBuilder, ItemList, RecQuery
from lenskit.knn import EASEScorer, ItemKNNScorer
from lenskit.training import TrainingOptions

from llmrec_assets.ground import surroundings
from llmrec_assets.ground.intervals import Floats
from llmrec_assets.ground.leave_last_out import (
    Candidate,
    Ints,
    LeaveLastOutResult,
    Scorer,
    leave_last_out,
    leave_last_out_table,
)
from llmrec_assets.ground.recipes import EvaluationRecipe, LeaveLastOutRecipe
from llmrec_assets.models.lenskit_threads import one_lenskit_thread


def classical_candidates(recipe: LeaveLastOutRecipe) -> list[Candidate]:
    """Popularity; ItemKNN (Deshpande & Karypis, TOIS 2004) with implicit feedback; EASE (Steck,
    WWW 2019): each setting of the recipe is a candidate.

    The settings' names are those of ``recipes.BaselinesRecipe``: its grid is larger, and tuned on
    other users' windows, so a row here and one there are not the same recommender.
    """
    return [
        Candidate("popularity", "", _fit_popularity),
        *(
            Candidate(
                "itemknn",
                f"save_nbrs {n}, max_nbrs all, feedback rated, last all",
                partial(_fit_item_knn, neighbours=n),
            )
            for n in recipe.knn_neighbours
        ),
        *(
            Candidate(
                "ease",
                f"regularization {value:g}, feedback rated, last all",
                partial(_fit_ease, regularization=value),
            )
            for value in recipe.ease_regularization
        ),
    ]


def classical_leave_last_out(
    ratings: pd.DataFrame,
    canonical: pd.DataFrame | None,
    recipe: LeaveLastOutRecipe,
    evaluation: EvaluationRecipe,
    seed: int,
) -> tuple[LeaveLastOutResult, float]:
    """Splits, fits and ranks; the table, and the share of users whose last two films share
    their time.

    Raises:
        DataError: no user has enough ratings.
    """
    surroundings.use_models()
    split = leave_last_out(ratings, canonical, recipe.min_interactions)
    with one_lenskit_thread():
        result = leave_last_out_table(split, classical_candidates(recipe), recipe, evaluation, seed)
    return result, split.share_tied


def _fit_popularity(histories: Sequence[Ints], n_items: int) -> Scorer:
    """By the number of users; films of equal number are tied."""
    scorer = PopScorer(score="count")
    scorer.train(_dataset(histories, n_items), _OPTIONS)
    scores = np.asarray(scorer(_all_items(n_items)).scores("numpy"), dtype=np.float64)

    def score(histories: Sequence[Ints]) -> Floats:
        return np.tile(scores, (len(histories), 1))

    return score


def _fit_item_knn(histories: Sequence[Ints], n_items: int, neighbours: int) -> Scorer:
    """Every film of the history brings its ``neighbours`` most similar films, by cosine; a film's
    score is the sum of what it is brought, without limit. (Limiting instead how many similarities
    a film may sum, LensKit's ``max_nbrs``, is a hundred times slower, as all are kept.)"""
    scorer = ItemKNNScorer(save_nbrs=neighbours, max_nbrs=n_items, feedback="implicit")
    scorer.train(_dataset(histories, n_items), _OPTIONS)
    items = _all_items(n_items)

    def score(histories: Sequence[Ints]) -> Floats:
        rows = np.empty((len(histories), n_items))
        for row, history in enumerate(histories):
            query = RecQuery(history_items=ItemList(item_ids=history))
            rows[row] = scorer(query, items).scores("numpy")
        return rows

    return score


def _fit_ease(histories: Sequence[Ints], n_items: int, regularization: float) -> Scorer:
    scorer = EASEScorer(regularization=regularization)
    scorer.train(_dataset(histories, n_items), _OPTIONS)
    weights = np.asarray(scorer.weights)

    def score(histories: Sequence[Ints]) -> Floats:
        # LensKit scores user by user; the films' numbers are their positions in both
        met = np.zeros((len(histories), n_items), dtype=weights.dtype)
        for row, history in enumerate(histories):
            met[row, history] = 1
        return (met @ weights).astype(np.float64)

    return score


# A GPU is one chair, and nobody has leased it here.
_OPTIONS = TrainingOptions(device="cpu")


def _all_items(n_items: int) -> ItemList:
    return ItemList(item_ids=np.arange(n_items))


def _dataset(histories: Sequence[Ints], n_items: int) -> Dataset:
    """LensKit's data set of implicit interactions. Films that nobody met in training are declared
    too: LensKit 2025.8's ItemKNN panics at a history with a film it does not know."""
    users = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    builder = DatasetBuilder()
    builder.add_entities("item", np.arange(n_items))
    builder.add_interactions(
        "rating",
        pd.DataFrame({"user_id": users, "item_id": np.concatenate(histories)}),
        entities=["user", "item"],
        missing="insert",
        default=True,
    )
    return builder.build()
