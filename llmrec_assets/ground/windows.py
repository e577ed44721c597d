"""Interaction windows: a user's recent films up to a cut-off, and the liked films that follow.

What belongs here: valid cut-offs and the draw among them. What does not: the user split
(``splits``), how a window is worded (``prompts``), and the checks that it holds (``leaks``,
written without this code so that they can catch its mistakes).

Three rules carry the rest:

* Interactions that share a time stay on one side of the cut-off, so a cut-off is the last
  interaction of a (user, time) group and a (user, time) pair names it.
* A film is counted once: where a user rated one film under two ids, only the earlier rating can
  be ground truth, so that no ground truth film is already in the history.
* The draw is by a hash of (seed, user, cut-off): no other user's data can move it.

Under the protocol ``temporal``, training users have no interaction after the global time at all,
so that neither a training window's ground truth nor its being valid can come from there; the
others' cut-offs lie at or after it. The global time is a quantile of all users' rating times, so
there, and there only, other users' data can move a window; ``temporal_time`` prevents it.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from llmrec_assets.ground.ordering import by_user_and_time, occurred_before
from llmrec_assets.ground.recipes import WindowRecipe
from llmrec_assets.ground.schemas import INTERACTION_WINDOWS
from llmrec_assets.ground.splits import temporal_split_time

# ``arg_min(place, draw, n)`` keeps where a user's n smallest draws are; sorting all cut-offs by
# their draw costs several times as much. Hexadecimal digits order as the text they are.
_DRAWN = """
WITH draws AS (
    SELECT
        user_id, count(*) AS n_valid_cutoffs,
        arg_min(place, md5(concat($seed, ':', user_id, ':', cutoff_timestamp)), $most) AS smallest
    FROM valid
    GROUP BY user_id
)
SELECT s.split, d.n_valid_cutoffs, unnest(smallest[:CASE s.split
    WHEN 'train' THEN $train WHEN 'validation' THEN $validation WHEN 'test' THEN $test
END]) AS place
FROM draws AS d
JOIN user_splits AS s ON s.user_id = d.user_id
ORDER BY place
"""


@dataclass(frozen=True)
class _Histories:
    """All interactions by (user, time, film, rating), and what is known at each of them.

    Every array has one element per interaction; counts are of the user's own history.
    """

    user_id: NDArray[np.int64]
    timestamp: NDArray[np.int64]
    movie_id: NDArray[np.int64]
    rating: NDArray[np.int64]
    candidate: NDArray[np.bool_]
    """could be ground truth: liked, and the first rating of the film"""
    position: NDArray[np.int32]
    """interactions up to and including this one"""
    candidates_before: NDArray[np.int32]
    """candidates up to and including this one, those of all earlier users with them"""
    candidates_left: NDArray[np.int32]
    """candidates that follow"""
    valid: NDArray[np.int64]
    """where the valid cut-offs are: the last interactions of their (user, time) groups"""


def valid_cutoffs(
    ratings: pd.DataFrame,
    recipe: WindowRecipe,
    canonical: pd.DataFrame | None = None,
    user_splits: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Every valid cut-off of every user.

    A cut-off is valid when at least ``min_per_class`` films up to it are liked or (balance
    ``either``, the paper's text; ``both``: and) as many are disliked, and at least
    ``min_ground_truth`` liked films follow it (paper §3.2).

    Args:
        ratings: ``RATINGS``, in any order.
        recipe: liked means ``rating >= liked_min``.
        canonical: ``movie_id`` and ``canonical_movie_id``; ``None``: every id is its own film.
        user_splits: ``USER_SPLITS``; the protocol ``temporal`` asks which users train.

    Returns:
        Columns ``user_id`` and ``cutoff_timestamp`` (Unix seconds), ordered by both.

    Raises:
        ValueError: the protocol is ``temporal`` and ``user_splits`` is ``None``.
    """
    if user_splits is None:
        if recipe.protocol == "temporal":
            raise ValueError("valid cut-offs under the protocol temporal need user_splits")
        user_splits = pd.DataFrame({"user_id": [], "split": []}).astype(
            {"user_id": "int32", "split": "str"}
        )
    histories = _histories(ratings, user_splits, recipe, canonical)
    return pd.DataFrame(
        {
            "user_id": histories.user_id[histories.valid].astype(np.int32),
            "cutoff_timestamp": histories.timestamp[histories.valid],
        }
    )


def interaction_windows(
    ratings: pd.DataFrame,
    user_splits: pd.DataFrame,
    recipe: WindowRecipe,
    seed: int,
    canonical: pd.DataFrame | None = None,
    *,
    threads: int = 2,
) -> pd.DataFrame:
    """Draws windows among each user's valid cut-offs (paper §3.2).

    Context: the last ``window_size`` interactions up to and including the cut-off; fewer where
    the history is shorter. Ground truth: the next ``top_k`` liked films after it, ordered by
    (time, movie id), without films already rated under another id. Both hold ids as rated.
    ``min(windows_per_user[split], valid cut-offs)`` distinct cut-offs are drawn per user. Under
    the protocol ``temporal`` a training window near the global time may have fewer ground truth
    films than ``top_k``: those that follow later are not known.

    Args:
        ratings: ``RATINGS``, in any order.
        user_splits: ``USER_SPLITS``; a user without a split gets no window.
        recipe: sizes and thresholds.
        seed: seed of the draw.
        canonical: ``movie_id`` and ``canonical_movie_id``; ``None``: every id is its own film.
        threads: DuckDB's threads; the result does not depend on it.

    Returns:
        ``INTERACTION_WINDOWS``, ordered by (user, window); zero rows when no cut-off is valid.
    """
    histories = _histories(ratings, user_splits, recipe, canonical)
    drawn = _drawn(histories, user_splits, recipe, seed, threads)
    at = drawn.column("place").to_numpy()
    users = histories.user_id[at]
    first = _starts(users)
    n_context = np.minimum(histories.position[at], recipe.window_size)
    context = _ranges(at + 1 - n_context, n_context)
    n_following = np.minimum(histories.candidates_left[at], recipe.top_k)
    following = _ranges(histories.candidates_before[at], n_following)
    candidates = histories.movie_id[histories.candidate]
    columns = {
        "user_id": users,
        "window_index": np.arange(len(at)) - np.repeat(first, np.diff(first, append=len(at))),
        "split": drawn.column("split"),
        "cutoff_timestamp": histories.timestamp[at],
        "n_history": histories.position[at],
        "n_valid_cutoffs": drawn.column("n_valid_cutoffs"),
        "context_movie_ids": context.of(histories.movie_id),
        "context_ratings": context.of(histories.rating),
        "ground_truth_movie_ids": following.of(candidates),
    }
    return pa.table(columns).cast(INTERACTION_WINDOWS).to_pandas()


def _histories(
    ratings: pd.DataFrame,
    user_splits: pd.DataFrame,
    recipe: WindowRecipe,
    canonical: pd.DataFrame | None,
) -> _Histories:
    """On whole columns, each ordered once: a SQL window function sorts and counts anew for every
    partition, at several times the cost (docs/performance.md)."""
    # without a rating there is no window to cut and no time to find
    split_time = None if ratings.empty else temporal_split_time(ratings, recipe)
    columns = [ratings[name].to_numpy() for name in ("user_id", "timestamp", "movie_id", "rating")]
    user, timestamp, movie, rating = by_user_and_time(*columns)
    trains = np.isin(user, user_splits.loc[user_splits["split"] == "train", "user_id"].to_numpy())
    if split_time is not None:
        known = (timestamp <= split_time) | ~trains
        user, timestamp, movie, rating = (
            column[known] for column in (user, timestamp, movie, rating)
        )
        trains = trains[known]
    liked = rating >= recipe.liked_min
    candidate = liked & ~occurred_before(user, _films(movie, canonical))

    starts = _starts(user)
    sizes = np.diff(starts, append=len(user))
    position = (np.arange(len(user)) - np.repeat(starts, sizes) + 1).astype(np.int32)
    n_liked = np.cumsum(liked, dtype=np.int32)
    n_liked -= np.repeat(n_liked[starts] - liked[starts], sizes)
    candidates_before = np.cumsum(candidate, dtype=np.int32)
    candidates_left = np.repeat(candidates_before[starts + sizes - 1], sizes) - candidates_before

    enough_liked = n_liked >= recipe.min_per_class
    enough_disliked = position - n_liked >= recipe.min_per_class
    valid = np.ones(len(user), dtype=np.bool_)  # the last of its user and time
    valid[:-1] = (user[1:] != user[:-1]) | (timestamp[1:] != timestamp[:-1])
    valid &= candidates_left >= recipe.min_ground_truth
    if recipe.balance == "both":
        valid &= enough_liked & enough_disliked
    else:
        valid &= enough_liked | enough_disliked
    if split_time is not None:
        valid &= trains | (timestamp >= split_time)
    return _Histories(
        user,
        timestamp,
        movie,
        rating,
        candidate,
        position,
        candidates_before,
        candidates_left,
        np.flatnonzero(valid),
    )


def _films(movie: NDArray[np.int64], canonical: pd.DataFrame | None) -> NDArray[np.int64]:
    """Canonical movie ids; a film that ``canonical`` lacks is its own."""
    if canonical is None or canonical.empty:
        return movie
    pairs = canonical[canonical["movie_id"] != canonical["canonical_movie_id"]]
    films = movie.copy()
    for movie_id, film in zip(pairs["movie_id"], pairs["canonical_movie_id"], strict=True):
        films[movie == movie_id] = film
    return films


def _drawn(
    histories: _Histories,
    user_splits: pd.DataFrame,
    recipe: WindowRecipe,
    seed: int,
    threads: int,
) -> pa.Table:
    """``split``, ``n_valid_cutoffs`` and ``place`` (in the arrays) of every drawn cut-off."""
    per_user = recipe.windows_per_user
    valid = pa.table(
        {
            "user_id": histories.user_id[histories.valid],
            "cutoff_timestamp": histories.timestamp[histories.valid],
            "place": histories.valid,
        }
    )
    with duckdb.connect(":memory:", config={"threads": threads}) as connection:
        connection.register("valid", valid)
        connection.register("user_splits", _arrow(user_splits, "user_id", "split"))
        return connection.sql(
            _DRAWN,
            params={
                "seed": str(seed),
                "train": per_user.train,
                "validation": per_user.validation,
                "test": per_user.test,
                "most": max(per_user.train, per_user.validation, per_user.test),
            },
        ).to_arrow_table()


@dataclass(frozen=True)
class _Ranges:
    """Ranges of positions, one after another in ``positions``, apart at ``offsets``."""

    offsets: NDArray[np.int32]
    positions: NDArray[np.int64]

    def of(self, values: NDArray[np.int64]) -> pa.ListArray:
        """The values of each range as a list."""
        return pa.ListArray.from_arrays(pa.array(self.offsets), pa.array(values[self.positions]))


def _ranges(start: NDArray[np.integer], size: NDArray[np.integer]) -> _Ranges:
    offsets = np.concatenate([[0], np.cumsum(size)]).astype(np.int32)
    return _Ranges(offsets, np.repeat(start - offsets[:-1], size) + np.arange(offsets[-1]))


def _starts(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each run of equal ids begins."""
    return np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])[: len(ids)])


def _arrow(frame: pd.DataFrame, *columns: str) -> pa.Table:
    """The named columns; strings as DuckDB reads them whatever pandas keeps them in."""
    table = pa.Table.from_pandas(frame[list(columns)], preserve_index=False)
    for index, field in enumerate(table.schema):
        if pa.types.is_large_string(field.type):
            table = table.set_column(index, field.name, table.column(index).cast(pa.string()))
    return table
