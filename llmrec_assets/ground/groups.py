"""NDCG@k by group of users: for whom a recommender works.

What belongs here: which group a user is of, and the table by group. What does not: metrics per
user (``evaluation``).
"""

from __future__ import annotations

import bisect

import numpy as np
import pandas as pd

from llmrec_assets.ground.beyond import training_popularity
from llmrec_assets.ground.comparisons import row_key, user_scores
from llmrec_assets.ground.intervals import bootstrap_means
from llmrec_assets.ground.movielens import AGE_BANDS
from llmrec_assets.ground.recipes import EvaluationRecipe
from llmrec_assets.ground.recommendations import LIST_KEY, WINDOW_KEY, Row, canonical_ids, typed
from llmrec_assets.ground.schemas import GROUP_METRICS

#: A group of fewer users is left out: an interval over them would say next to nothing.
MIN_USERS = 10

_TERCILES = ("low", "middle", "high")
_GENDERS = {"F": "women", "M": "men"}


def group_metrics(
    user_metrics: pd.DataFrame,
    groups: pd.DataFrame,
    recipe: EvaluationRecipe,
    seed: int,
    user_metrics_version: str,
) -> pd.DataFrame:
    """NDCG@k with intervals per group and recommender.

    Args:
        user_metrics: ``USER_METRICS``.
        groups: ``user_groups`` of the users scored; a user may be missing from a grouping.
        recipe: resamples and confidence of the intervals.
        seed: seed of the resamples; all rows share a group's draws.
        user_metrics_version: version of the metrics, which the table names.

    Returns:
        ``GROUP_METRICS``, ordered by protocol, grouping, group, row. Groups of fewer than
        ``MIN_USERS`` are left out, their users counted in ``users_left_out``.
    """
    rows: list[dict[str, object]] = []
    for protocol, metrics in user_metrics.groupby("protocol", sort=True):
        scores = user_scores(metrics)
        names = sorted(scores, key=row_key)
        table = pd.DataFrame({name: scores[name] for name in names})
        hits = metrics.groupby([*LIST_KEY, "user_id"])["hits"].sum()
        mine = groups[groups["user_id"].isin(table.index)]
        for grouping in mine["grouping"].drop_duplicates().tolist():
            members = mine[mine["grouping"] == grouping].groupby(["position", "group"])["user_id"]
            large = {key: ids.tolist() for key, ids in members if len(ids) >= MIN_USERS}
            left_out = len(table) - sum(map(len, large.values()))
            for (position, group), ids in large.items():
                shown: dict[str, object] = {
                    "protocol": protocol,
                    "grouping": grouping,
                    "group": group,
                    "position": position,
                    "n_users": len(ids),
                    "users_left_out": left_out,
                    "user_metrics_version": user_metrics_version,
                }
                rows += _group_rows(shown, names, table.loc[ids], hits, recipe, seed)
    return typed(pd.DataFrame(rows, columns=GROUP_METRICS.names), GROUP_METRICS)


def _group_rows(
    shown: dict[str, object],
    names: list[Row],
    scores: pd.DataFrame,
    hits: pd.Series,
    recipe: EvaluationRecipe,
    seed: int,
) -> list[dict[str, object]]:
    mean, low, high = bootstrap_means(scores.to_numpy(), recipe.resamples, seed, recipe.confidence)
    return [
        {
            **shown,
            **dict(zip(LIST_KEY, name, strict=True)),
            "hits": int(hits.loc[name].loc[scores.index].sum()),
            "ndcg": mean[i],
            "ndcg_low": low[i],
            "ndcg_high": high[i],
        }
        for i, name in enumerate(names)
    ]


def user_groups(
    prompts: pd.DataFrame,
    windows: pd.DataFrame,
    users: pd.DataFrame,
    ratings: pd.DataFrame,
    user_splits: pd.DataFrame,
    movies: pd.DataFrame,
    until: int | None = None,
) -> pd.DataFrame:
    """The group of every user of ``windows`` under every grouping.

    ``age``: MovieLens-1M's bands, also for ages in years. ``gender``: as the source has it.
    ``activity``: terciles of the films rated by the cut-off. ``ground truth popularity``: terciles
    of the mean number of training users who rated the ground truth. Terciles are over these
    users, windows averaged first; who stand on a limit together stay together.

    Args:
        prompts: ``PROMPTS`` of the windows scored, for the ground truth.
        windows: ``INTERACTION_WINDOWS``; others than the prompts' are ignored.
        users: ``USERS``.
        ratings: ``RATINGS``.
        user_splits: ``USER_SPLITS``.
        movies: ``MOVIES``.
        until: popularity counts no later rating (``splits.temporal_split_time``).

    Returns:
        Columns ``user_id``, ``grouping``, ``group``, ``position``.
    """
    asked = prompts[[*WINDOW_KEY, "ground_truth_movie_ids"]].merge(
        windows[[*WINDOW_KEY, "n_history"]], on=WINDOW_KEY
    )
    counts = training_popularity(ratings, user_splits, movies, until)
    film_of = canonical_ids(movies)
    asked["popularity"] = [
        float(np.mean([counts[film_of[int(i)]] for i in ids]))
        for ids in asked["ground_truth_movie_ids"].tolist()
    ]
    by_user = asked.groupby("user_id")[["n_history", "popularity"]].mean()
    own = users[users["user_id"].isin(by_user.index)]
    bands = list(AGE_BANDS.values())
    age = own["age_band"].where(own["age_band"].notna(), own["age"].map(_band, na_action="ignore"))
    parts = [
        _grouping("age", own["user_id"], age, {band: i for i, band in enumerate(bands)}),
        _grouping("gender", own["user_id"], own["gender"].map(_GENDERS), {"women": 0, "men": 1}),
    ]
    for name, column in (("activity", "n_history"), ("ground truth popularity", "popularity")):
        values = by_user[column]
        places = {tercile: i for i, tercile in enumerate(_TERCILES)}
        parts.append(_grouping(name, values.index.to_series(), _terciles(values), places))
    return pd.concat(parts, ignore_index=True)


def _band(age: int) -> str:
    """The band of an age in years; a band starts at its code (under 18: 1)."""
    starts = sorted(AGE_BANDS)
    return AGE_BANDS[starts[max(0, bisect.bisect_right(starts, age) - 1)]]


def _terciles(values: pd.Series) -> pd.Series:
    first, second = np.quantile(values, [1 / 3, 2 / 3])
    places = (values > first).astype(int) + (values > second).astype(int)
    return places.map(dict(enumerate(_TERCILES)))


def _grouping(
    name: str, user_ids: pd.Series, groups: pd.Series, positions: dict[str, int]
) -> pd.DataFrame:
    table = pd.DataFrame(
        {"user_id": user_ids.to_numpy(), "grouping": name, "group": groups.to_numpy()}
    ).dropna()
    return table.assign(position=table["group"].map(positions).astype("int16"))
