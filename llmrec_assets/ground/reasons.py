"""Why a film may suit a user: the film of their own history that it is most like, as measured.

What belongs here: similarity of two films by the users who liked both, or by genre, and the
sentence about it. What does not: the recommendation. The language model ranks without this; the
reason is counted from the data set's ratings, it is not what the model thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import pandas as pd

from llmrec_assets.ground.recommendations import canonical_ids

#: Added to the cosine's denominator, so that two films with one common admirer do not win (the
#: shrinkage of item-item similarities: Koren, 2008, §2.2).
_SHRINKAGE = 10.0


class Reasons:
    """Reasons from one data set's ratings.

    Args:
        ratings: ``RATINGS`` of the data set.
        catalogue: ``CATALOGUE``, for titles and genres.
        liked_min: rating from which a film is liked.
    """

    def __init__(self, ratings: pd.DataFrame, catalogue: pd.DataFrame, liked_min: int) -> None:
        self._film_of = canonical_ids(catalogue)
        self._liked_min = liked_min
        liked = ratings[ratings["rating"] >= liked_min]
        films = liked["movie_id"].map(self._film_of)
        self._admirers: dict[int, set[int]] = {
            int(str(film)): set(users) for film, users in liked["user_id"].groupby(films)
        }
        ids = catalogue["movie_id"].tolist()
        self._title_of = dict(zip(ids, catalogue["title"].str.strip().tolist(), strict=True))
        self._genres_of = dict(zip(ids, map(tuple, catalogue["genres"]), strict=True))

    def reason(self, film: int, history: pd.DataFrame, asking: int | None = None) -> str:
        """One line on the liked film of ``history`` that ``film`` is most like.

        By the cosine of their admirers, shrunk; where no film of the history shares an admirer
        with it, by the overlap (Jaccard) of genres.

        Args:
            film: canonical movie id.
            history: ``RATINGS`` of the one user.
            asking: their id in the data set; their own ratings do not count. None: not in it.
        """
        liked = history.loc[history["rating"] >= self._liked_min, "movie_id"]
        known = list(dict.fromkeys(self._film_of[i] for i in liked.tolist() if i in self._film_of))
        if not known:
            return "no film in the history was liked, so there is none to compare this with"
        own = {asking}
        theirs = self._admirers.get(film, set()) - own
        closeness = {}
        for other in known:
            admirers = self._admirers.get(other, set()) - own
            both = len(admirers & theirs)
            scale = sqrt(len(admirers) * len(theirs)) + _SHRINKAGE
            closeness[other] = (both / scale, both, len(admirers))
        best = max(known, key=lambda other: closeness[other][0])
        _, both, of = closeness[best]
        if both:
            return (
                f"liked {self._title_of[best]}: so did {of:,} other{'s' * (of > 1)}, of whom "
                f"{both:,} liked this too"
            )
        best = max(known, key=lambda other: self._overlap(film, other))
        shared = [name for name in self._genres_of[film] if name in self._genres_of[best]]
        if shared:
            return f"liked {self._title_of[best]}: this is {_and(shared)} too"
        return "no liked film in the history is like this, by who liked both or by genre"

    def _overlap(self, film: int, other: int) -> float:
        ours, theirs = set(self._genres_of[film]), set(self._genres_of[other])
        return len(ours & theirs) / max(len(ours | theirs), 1)


def _and(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]
