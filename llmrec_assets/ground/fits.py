"""What a classical recommender was fitted on, and whether it was allowed to be.

What belongs here: the events a fit may use, the record a fit leaves, and the check of that
record. What does not: the fits themselves (the models floor) and an LLM's trainings, whose users
their manifest names (``stages``).

A record is made of the very events that were handed to the fit; the check counts anew, from the
ratings and the split alone, with plain loops, so that it catches a mistake of ``training_events``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from llmrec_assets.ground.recommendations import canonical_ids

_EVENT = ["user_id", "film", "rating", "timestamp"]


@dataclass(frozen=True)
class FitRecord:
    """One fit: whose events, how many, up to when, and which windows it answered.

    ``until``: no event is later (Unix seconds); ``None``: all events of training users, also those
    after a test window's cut-off, as the paper's user split has it.
    """

    stage: str
    until: int | None
    user_ids: tuple[int, ...]
    n_events: int
    last_timestamp: int | None
    events_hash: str
    answered: tuple[tuple[int, int], ...]


def training_events(
    ratings: pd.DataFrame, user_splits: pd.DataFrame, movies: pd.DataFrame, until: int | None = None
) -> pd.DataFrame:
    """The events a classical recommender may be fitted on.

    Args:
        ratings: ``RATINGS``.
        user_splits: ``USER_SPLITS``.
        movies: ``MOVIES``.
        until: Unix seconds; later events are left out. ``None``: none is.

    Returns:
        Columns ``user_id``, ``film`` (canonical id), ``rating`` and ``timestamp`` of the training
        users, ordered by (user, time, movie id) as a window's history is.
    """
    train = user_splits.loc[user_splits["split"] == "train", "user_id"]
    events = ratings[ratings["user_id"].isin(train)]
    if until is not None:
        events = events[events["timestamp"] <= until]
    events = events.sort_values(["user_id", "timestamp", "movie_id", "rating"])
    film_of = canonical_ids(movies)
    films = [film_of.get(movie_id, movie_id) for movie_id in events["movie_id"].tolist()]
    return events.assign(film=films)[_EVENT].reset_index(drop=True)


def fit_record(
    stage: str, events: pd.DataFrame, until: int | None, answered: Iterable[tuple[int, int]]
) -> FitRecord:
    """The record of a fit on ``events`` (columns as ``training_events`` gives them)."""
    rows = list(zip(*(events[name].tolist() for name in _EVENT), strict=True))
    return FitRecord(
        stage=stage,
        until=until,
        user_ids=tuple(sorted(set(events["user_id"].tolist()))),
        n_events=len(events),
        last_timestamp=int(events["timestamp"].max()) if len(events) else None,
        events_hash=_hash(rows),
        answered=tuple(answered),
    )


def time_grid(cutoffs: Sequence[int], points: int) -> list[int]:
    """At most ``points`` times at equal shares of the cut-offs, ascending, the first of them the
    earliest cut-off: every window has a grid point at or before its own."""
    ordered = sorted(cutoffs)
    return sorted({ordered[len(ordered) * i // points] for i in range(points)}) if ordered else []


def grid_point(grid: Sequence[int], cutoff: int) -> int:
    """The latest point of the grid at or before ``cutoff``.

    Raises:
        ValueError: all are later.
    """
    earlier = [point for point in grid if point <= cutoff]
    if not earlier:
        raise ValueError(f"no grid point at or before {cutoff}: the first is {min(grid)}")
    return max(earlier)


def fit_problems(
    records: Sequence[FitRecord],
    tuned_on: Iterable[int],
    ratings: pd.DataFrame,
    user_splits: pd.DataFrame,
    movies: pd.DataFrame,
    cutoff_of: Mapping[tuple[int, int], int],
) -> list[str]:
    """Everything in the records that the ratings, the split or the cut-offs contradict.

    Held against: only training users' events, all of them up to the fit's time and none later
    (their number and their hash are counted anew); a fit with a time answers only windows whose
    cut-off is not before it; only validation users' windows chose the hyperparameters.

    Args:
        records: one per fit that answered a window.
        tuned_on: users whose windows chose the hyperparameters.
        ratings: ``RATINGS``.
        user_splits: ``USER_SPLITS``.
        movies: ``MOVIES``.
        cutoff_of: cut-off of every test window, Unix seconds.

    Returns:
        One sentence per problem.
    """
    split_of = dict(
        zip(user_splits["user_id"].tolist(), user_splits["split"].tolist(), strict=True)
    )
    film_of = canonical_ids(movies)
    allowed = [
        (user, film_of.get(movie_id, movie_id), rating, time)
        for user, movie_id, rating, time in zip(
            *(ratings[name].tolist() for name in ("user_id", "movie_id", "rating", "timestamp")),
            strict=True,
        )
        if split_of.get(user) == "train"
    ]
    expected: dict[int | None, tuple[int, str]] = {}
    problems = [
        f"user {user} chose hyperparameters, their split is {split_of.get(user, 'unknown')}"
        for user in sorted(set(tuned_on))
        if split_of.get(user) != "validation"
    ]
    for record in records:
        until = record.until
        place = record.stage if until is None else f"{record.stage}, fitted up to {until}"
        problems += [
            f"{place}: user {user} took part in the fit, their split is "
            f"{split_of.get(user, 'unknown')}"
            for user in record.user_ids
            if split_of.get(user) != "train"
        ]
        if until is not None:
            if record.last_timestamp is not None and record.last_timestamp > until:
                problems.append(f"{place}: an event of {record.last_timestamp} took part")
            problems += [
                f"{place}: answered user {user}, window {index}, whose cut-off is "
                f"{cutoff_of.get((user, index))}"
                for user, index in record.answered
                if cutoff_of.get((user, index), until - 1) < until
            ]
        if until not in expected:
            kept = [row for row in allowed if until is None or row[3] <= until]
            expected[until] = len(kept), _hash(kept)
        n_events, events_hash = expected[until]
        if record.n_events != n_events:
            problems.append(
                f"{place}: {record.n_events} events took part, training users have {n_events}"
            )
        elif record.events_hash != events_hash:
            problems.append(f"{place}: its events are not those of the training users")
    return problems


def _hash(rows: Iterable[tuple[int, int, int, int]]) -> str:
    ordered = np.array(sorted(rows), dtype=np.int64)
    return hashlib.sha256(ordered.tobytes()).hexdigest()[:16]
