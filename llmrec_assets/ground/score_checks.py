"""Whether the metrics per user hold: everything counted again from the raw ratings.

What belongs here: one pure function that names every problem it finds. It is written with plain
loops and sets, without the columns and functions of ``evaluation`` and ``recommendations``, so
that it catches their mistakes; it trusts neither the lists' marks for seen and repeated films nor
their length. What does not: the metrics (``evaluation``), and the Dagster check that blocks on it.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

_ROW = ["stage", "decoding", "information_set", "user_id", "window_index"]
_SLOT = ["rank", "movie_id", "is_seen", "is_duplicate"]


def score_problems(
    user_metrics: pd.DataFrame,
    recommendations: pd.DataFrame,
    prompts: pd.DataFrame,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    top_k: int,
) -> list[str]:
    """Everything in ``USER_METRICS`` that ratings, prompts and lists contradict.

    Held against: films are of the catalogue, by their canonical id; every list scored has exactly
    the ranks 1 to ``top_k``, and every list is scored once; a slot's film is marked as seen
    exactly when the user had rated it by the cut-off, under any of its ids; no film of the ground
    truth had been rated by then, so that no counted hit was; hits, NDCG, Precision and Recall are
    those counted here (to 1e-9).

    Args:
        user_metrics: ``USER_METRICS``.
        recommendations: ``RECOMMENDATIONS`` it scores.
        prompts: ``PROMPTS``, for cut-offs and ground truth.
        ratings: ``RATINGS``.
        movies: ``MOVIES``.
        top_k: the recipe's list length.

    Returns:
        One sentence per problem, each naming row, user and window.
    """
    film_of = dict(
        zip(movies["movie_id"].tolist(), movies["canonical_movie_id"].tolist(), strict=True)
    )
    known = _known_by(ratings, set(prompts["user_id"]), film_of)
    asked = {}
    columns = [
        prompts[name].tolist()
        for name in ("user_id", "window_index", "cutoff_timestamp", "ground_truth_movie_ids")
    ]
    for user, window, cutoff, truth in zip(*columns, strict=True):
        seen = {film for film, time in known.get(user, {}).items() if time <= cutoff}
        asked[user, window] = ({film_of.get(int(i), int(i)) for i in truth}, seen)

    problems = [
        f"recommendations: film {int(film)} is no canonical film of the catalogue"
        for film in recommendations["movie_id"].dropna().unique().tolist()
        if film_of.get(int(film)) != int(film)
    ]
    lists: dict[tuple, list[tuple]] = {}
    keys = zip(*(recommendations[name].tolist() for name in _ROW), strict=True)
    slots = zip(*(recommendations[name].tolist() for name in _SLOT), strict=True)
    for key, slot in zip(keys, slots, strict=True):
        lists.setdefault(key, []).append(slot)

    scored: set[tuple] = set()
    numbers = ("ndcg", "precision", "recall", "hits", "n_ground_truth")
    scores = zip(*(user_metrics[name].tolist() for name in numbers), strict=True)
    keys = zip(*(user_metrics[name].tolist() for name in _ROW), strict=True)
    for key, stated in zip(keys, scores, strict=True):
        if key in scored:
            problems.append(_place(key) + "is scored twice")
            continue
        scored.add(key)
        if key[3:] not in asked or key not in lists:
            problems.append(_place(key) + "is scored without a prompt or without a list")
            continue
        truth, seen = asked[key[3:]]
        found = _one_list(lists[key], truth, seen, dict(zip(numbers, stated, strict=True)), top_k)
        problems += [_place(key) + problem for problem in found]
    return problems + [_place(key) + "is not scored" for key in sorted(set(lists) - scored)]


def _one_list(
    slots: list[tuple], truth: set[int], seen: set[int], stated: dict[str, Any], top_k: int
) -> list[str]:
    problems = []
    slots = sorted(slots, key=lambda slot: slot[0])
    if [slot[0] for slot in slots] != list(range(1, top_k + 1)):
        problems.append(f"has {len(slots)} slots, expected the ranks 1 to {top_k} once each")
    hits, gain, better = 0, 0.0, set()
    for rank, film, marked_seen, marked_duplicate in slots:
        nothing = bool(pd.isna(film))
        film = None if nothing else int(film)
        if marked_seen and film not in seen:
            problems.append(f"film {film} at rank {rank} is marked as seen, but was not rated")
        if film in seen and not marked_seen:
            problems.append(f"film {film} at rank {rank} was rated by the cut-off, not marked seen")
        if bool(marked_duplicate) != (film in better):
            problems.append(f"film {film} at rank {rank} is wrongly marked as repeated or not")
        if nothing:
            continue
        if film in truth and film not in seen and film not in better:
            hits += 1
            gain += 1 / math.log2(1 + rank)
        better.add(film)
    known = sorted(truth & seen)
    if known:
        problems.append(f"its ground truth {known} was rated by the cut-off: a hit would be seen")
    if not truth:
        return [*problems, "has no ground truth to be scored by"]
    ideal = sum(1 / math.log2(1 + rank) for rank in range(1, min(top_k, len(truth)) + 1))
    counted = {
        "hits": hits,
        "n_ground_truth": len(truth),
        "ndcg": gain / ideal,
        "precision": hits / top_k,
        "recall": hits / len(truth),
    }
    for name, value in counted.items():
        if not abs(stated[name] - value) <= 1e-9:
            problems.append(f"{name} is {stated[name]}, counted again it is {value}")
    return problems


def _known_by(
    ratings: pd.DataFrame, users: set[int], film_of: dict[int, int]
) -> dict[int, dict[int, int]]:
    """User → film → when they first rated it, under whichever id."""
    known: dict[int, dict[int, int]] = {}
    wanted = ratings[ratings["user_id"].isin(users)]
    columns = (wanted[name].tolist() for name in ("user_id", "movie_id", "timestamp"))
    for user, movie_id, time in zip(*columns, strict=True):
        film = film_of.get(movie_id, movie_id)
        first = known.setdefault(user, {})
        first[film] = min(time, first.get(film, time))
    return known


def _place(key: tuple) -> str:
    return f"{key[0]} ({key[1]}, {key[2]}), user {key[3]}, window {key[4]}: "
