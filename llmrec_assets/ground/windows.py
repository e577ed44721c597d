"""Interaction windows: a user's recent films up to a cut-off, and the liked films that follow.

What belongs here: valid cut-offs and the draw among them, in DuckDB SQL. What does not: the user
split (``splits``), how a window is worded (``prompts``), and the checks that it holds
(``leaks``, written without this SQL so that they can catch its mistakes).

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

import duckdb
import pandas as pd
import pyarrow as pa

from llmrec_assets.ground.recipes import WindowRecipe
from llmrec_assets.ground.schemas import INTERACTION_WINDOWS
from llmrec_assets.ground.splits import temporal_split_time

_CUTOFFS = pa.schema([("user_id", pa.int32()), ("cutoff_timestamp", pa.int64())])

# ``position`` numbers a user's interactions, ``candidates`` counts those up to and including
# this one that could be ground truth: liked, and the first rating of the film.
_INTERACTIONS = """
CREATE TEMP TABLE interactions AS
WITH rated AS (
    SELECT
        r.user_id, r.movie_id, r.rating, r.timestamp,
        r.rating >= $liked_min AS liked,
        row_number() OVER (
            PARTITION BY r.user_id, coalesce(c.canonical_movie_id, r.movie_id)
            ORDER BY r.timestamp, r.movie_id, r.rating
        ) = 1 AS first_rating,
        r.user_id IN (SELECT user_id FROM user_splits WHERE split = 'train') AS trains
    FROM ratings AS r
    LEFT JOIN canonical AS c ON c.movie_id = r.movie_id
    WHERE $split_time IS NULL OR r.timestamp <= $split_time OR NOT trains
)
SELECT
    user_id, movie_id, rating, timestamp, trains,
    liked AND first_rating AS candidate,
    row_number() OVER history AS position,
    count(*) FILTER (liked) OVER history AS n_liked,
    count(*) FILTER (liked AND first_rating) OVER history AS candidates,
    count(*) FILTER (liked AND first_rating) OVER (PARTITION BY user_id) AS all_candidates,
    lead(timestamp) OVER history IS DISTINCT FROM timestamp AS ends_its_time
FROM rated
WINDOW history AS (
    PARTITION BY user_id ORDER BY timestamp, movie_id, rating
    ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
)
"""

_VALID = """
CREATE TEMP TABLE valid AS
SELECT user_id, timestamp AS cutoff_timestamp, position, candidates
FROM interactions
WHERE ends_its_time
  AND ($split_time IS NULL OR trains OR timestamp >= $split_time)
  AND all_candidates - candidates >= $min_ground_truth
  AND CASE WHEN $both
      THEN n_liked >= $min_per_class AND position - n_liked >= $min_per_class
      ELSE n_liked >= $min_per_class OR position - n_liked >= $min_per_class
  END
"""

# Lists are built for drawn cut-offs only: there are hundreds of valid ones per drawn one.
_WINDOWS = """
WITH ordered AS (
    SELECT
        valid.*, s.split,
        count(*) OVER (PARTITION BY valid.user_id) AS n_valid_cutoffs,
        row_number() OVER (
            PARTITION BY valid.user_id
            ORDER BY
                md5($seed || ':' || valid.user_id || ':' || valid.cutoff_timestamp),
                valid.cutoff_timestamp
        ) AS draw
    FROM valid
    JOIN user_splits AS s ON s.user_id = valid.user_id
),
drawn AS (
    SELECT
        *,
        row_number() OVER (PARTITION BY user_id ORDER BY cutoff_timestamp) - 1 AS window_index
    FROM ordered
    WHERE draw <= CASE split
        WHEN 'train' THEN $train WHEN 'validation' THEN $validation WHEN 'test' THEN $test
    END
),
context AS (
    SELECT
        d.user_id, d.cutoff_timestamp,
        list(i.movie_id ORDER BY i.position) AS context_movie_ids,
        list(i.rating ORDER BY i.position) AS context_ratings
    FROM drawn AS d
    JOIN interactions AS i
      ON i.user_id = d.user_id
     AND i.position > d.position - $window_size AND i.position <= d.position
    GROUP BY d.user_id, d.cutoff_timestamp
),
following AS (
    SELECT
        d.user_id, d.cutoff_timestamp,
        list(i.movie_id ORDER BY i.position) AS ground_truth_movie_ids
    FROM drawn AS d
    JOIN interactions AS i
      ON i.user_id = d.user_id AND i.candidate
     AND i.candidates > d.candidates AND i.candidates <= d.candidates + $top_k
    GROUP BY d.user_id, d.cutoff_timestamp
)
SELECT
    d.user_id, d.window_index, d.split, d.cutoff_timestamp,
    d.position AS n_history, d.n_valid_cutoffs,
    context_movie_ids, context_ratings, ground_truth_movie_ids
FROM drawn AS d
JOIN context USING (user_id, cutoff_timestamp)
JOIN following USING (user_id, cutoff_timestamp)
ORDER BY d.user_id, d.window_index
"""


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
    with _connection(ratings, user_splits, recipe, canonical, threads=2) as connection:
        found = connection.sql(
            "SELECT user_id, cutoff_timestamp FROM valid ORDER BY user_id, cutoff_timestamp"
        ).to_arrow_table()
    return found.cast(_CUTOFFS).to_pandas()


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
    per_user = recipe.windows_per_user
    with _connection(ratings, user_splits, recipe, canonical, threads) as connection:
        found = connection.sql(
            _WINDOWS,
            params={
                "seed": str(seed),
                "window_size": recipe.window_size,
                "top_k": recipe.top_k,
                "train": per_user.train,
                "validation": per_user.validation,
                "test": per_user.test,
            },
        ).to_arrow_table()
    return found.cast(INTERACTION_WINDOWS).to_pandas()


def _connection(
    ratings: pd.DataFrame,
    user_splits: pd.DataFrame,
    recipe: WindowRecipe,
    canonical: pd.DataFrame | None,
    threads: int,
) -> duckdb.DuckDBPyConnection:
    """An in-memory database that holds ``interactions`` and ``valid``."""
    if canonical is None:
        canonical = pd.DataFrame({"movie_id": [], "canonical_movie_id": []}, dtype="int32")
    connection = duckdb.connect(":memory:", config={"threads": threads})
    connection.register("ratings", _arrow(ratings, "user_id", "movie_id", "rating", "timestamp"))
    connection.register("canonical", _arrow(canonical, "movie_id", "canonical_movie_id"))
    connection.register("user_splits", _arrow(user_splits, "user_id", "split"))
    # without a rating there is no window to cut and no time to find
    split_time = None if ratings.empty else temporal_split_time(ratings, recipe)
    connection.execute(_INTERACTIONS, {"liked_min": recipe.liked_min, "split_time": split_time})
    connection.execute(
        _VALID,
        {
            "split_time": split_time,
            "min_ground_truth": recipe.min_ground_truth,
            "min_per_class": recipe.min_per_class,
            "both": recipe.balance == "both",
        },
    )
    return connection


def _arrow(frame: pd.DataFrame, *columns: str) -> pa.Table:
    """The named columns; strings as DuckDB reads them whatever pandas keeps them in."""
    table = pa.Table.from_pandas(frame[list(columns)], preserve_index=False)
    for index, field in enumerate(table.schema):
        if pa.types.is_large_string(field.type):
            table = table.set_column(index, field.name, table.column(index).cast(pa.string()))
    return table
