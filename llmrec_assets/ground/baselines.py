"""Recommendations by popularity: the floor every other recommender has to clear.

What belongs here: rankings that need no model. What does not: the trained classical
recommenders (models floor) and the metrics (``evaluation``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pandas as pd

from llmrec_assets.ground.recommendations import canonical_ids
from llmrec_assets.ground.recommender import Window

STAGE = "popularity"


def popularity_ranking(events: pd.DataFrame, movies: pd.DataFrame, liked_min: int) -> list[int]:
    """All canonical films, the one liked by most training users first; ties by smallest id.

    A user counts once a film.

    Args:
        events: ``training_events``: over training users' whole history, since in a user split
            (paper §3.2) what they rated after a test user's cut-off is known; or up to a time.
        movies: ``MOVIES``.
        liked_min: rating from which a film is liked.

    Returns:
        Canonical movie ids; films that no training user liked come last.
    """
    liked = events.loc[events["rating"] >= liked_min, ["user_id", "film"]]
    n_users = liked.drop_duplicates()["film"].value_counts().to_dict()
    catalogue = set(canonical_ids(movies).values())
    return sorted(catalogue, key=lambda film: (-n_users.get(film, 0), film))


class Popularity:
    """A ``Recommender``: the first films of one ranking that a window does not hide."""

    def __init__(self, ranking: Sequence[int]) -> None:
        self._ranking = list(ranking)

    def recommend(self, windows: Sequence[Window], top_k: int) -> list[list[int]]:
        return [
            list(islice((film for film in self._ranking if film not in window.hidden), top_k))
            for window in windows
        ]
