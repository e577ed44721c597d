"""Classical recommenders by LensKit: ItemKNN, EASE and implicit ALS.

What belongs here: LensKit's components behind one interface, scores over the catalogue, and the
ranking of scores. What does not: the sequential model (``sasrec``), which values are chosen and
which windows are answered (``classical_lists``), and popularity (``ground.baselines``).

LensKit takes a user it was not fitted on as the list of their films (``RecQuery``): ItemKNN sums
their similarities to a film, EASE its weights from them, ALS solves for the user's factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Protocol

import numpy as np
import pandas as pd
from lenskit.als import ImplicitMFScorer
from lenskit.data import ItemList, RecQuery, from_interactions_df
from lenskit.knn import EASEScorer, ItemKNNScorer
from lenskit.training import TrainingOptions
from numpy.typing import NDArray

from llmrec_assets.ground.recommender import Window
from llmrec_assets.models.lenskit_threads import one_lenskit_thread


class Scorer(Protocol):
    """Scores (windows, films) over the columns of one catalogue; NaN where it has no opinion."""

    def scores(self, windows: Sequence[Window]) -> NDArray[np.float32]: ...


class LensKitScorer:
    """One LensKit component, fitted on implicit feedback.

    Args:
        component: unfitted.
        events: ``training_events``.
        catalogue: canonical ids, one per column of the scores.
        only_liked: liked events alone are feedback, of the training users and of the windows;
            otherwise every rated film is.
        liked_min: rating from which a film is liked.
        seed: of ALS' first factors.
    """

    def __init__(
        self,
        component: Any,
        events: pd.DataFrame,
        catalogue: Sequence[int],
        *,
        only_liked: bool,
        liked_min: int,
        seed: int,
    ) -> None:
        self._component, self._only_liked = component, only_liked
        used = events[events["rating"] >= liked_min] if only_liked else events
        pairs = used[["user_id", "film"]].drop_duplicates()
        known = self._known = set(pairs["film"].tolist())
        self._last: int | None = None
        self._columns = [column for column, film in enumerate(catalogue) if film in known]
        self._n_films = len(catalogue)
        if known:
            with one_lenskit_thread():
                self._items = ItemList(item_ids=[catalogue[column] for column in self._columns])
                data = from_interactions_df(pairs.rename(columns={"film": "item_id"}))
                component.train(data, TrainingOptions(rng=seed, device="cpu"))

    def using(self, last: int) -> LensKitScorer:
        """The same fit; queries are the ``last`` films of a window alone."""
        other = copy(self)
        other._last = last
        return other

    def scores(self, windows: Sequence[Window]) -> NDArray[np.float32]:
        """A film without feedback has no score, a window without a known film none at all."""
        scores = np.full((len(windows), self._n_films), np.nan, dtype=np.float32)
        with one_lenskit_thread():
            for row, window in enumerate(windows):
                # films without feedback stay here: LensKit 2025.8 fails on them, ItemKNN with a
                # panic of its extension and ALS with a KeyError
                told = window.evidence(self._only_liked, self._last)
                films = [film for film in told if film in self._known]
                if films:
                    scores[row, self._columns] = self._of_items(films)
        return scores

    def _of_items(self, films: Sequence[int]) -> NDArray[np.float32]:
        """Scores of the films with feedback, for a user who is known by ``films``."""
        if isinstance(self._component, EASEScorer):
            # what the component computes, from the rows it needs: it multiplies by all of them
            weights, items = self._component.weights, self._component.items
            return weights[items.numbers(films)].sum(axis=0)[self._items.numbers(vocabulary=items)]
        query = RecQuery(history_items=ItemList(item_ids=films))
        return self._component(query, self._items).scores()


def component(stage: str, values: Mapping[str, Any]) -> Any:
    """LensKit's unfitted component of ``stage`` with these hyperparameters.

    Raises:
        KeyError: there is no such stage.
    """
    classes: dict[str, Any] = {
        "itemknn": ItemKNNScorer,
        "ease": EASEScorer,
        "als": ImplicitMFScorer,
    }
    options = {"feedback": "implicit"} if stage == "itemknn" else {}
    return classes[stage](**options, **values)


class ScoredRecommender:
    """A ``Recommender``: the films of the highest scores, hidden ones left out.

    Equal scores and films without a score, which come last, keep the catalogue's order.

    Args:
        scorer: scores over the columns of ``catalogue``.
        catalogue: canonical ids, the most popular among the scorer's training events first.
    """

    def __init__(self, scorer: Scorer, catalogue: Sequence[int]) -> None:
        self._scorer, self._catalogue = scorer, np.array(catalogue)

    def recommend(self, windows: Sequence[Window], top_k: int) -> list[list[int]]:
        lists = []
        for window, scores in zip(windows, self._scorer.scores(windows), strict=True):
            order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")
            films = (film for film in self._catalogue[order].tolist() if film not in window.hidden)
            lists.append([film for film, _ in zip(films, range(top_k), strict=False)])
        return lists
