"""The contract of a recommender, and the lists it gives as a table.

What belongs here: what a recommender may know of a window (its information set), the protocol
every classical recommender implements, its lists as ``RECOMMENDATIONS`` or as candidates for
another, and whether a table of lists keeps the contract. What does not: any recommender
(``baselines``, the models floor), what its fit was allowed to see (``fits``), and what a list is
worth (``evaluation``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd

from llmrec_assets.ground.recommendations import (
    LIST_KEY,
    WINDOW_KEY,
    Seen,
    canonical_ids,
    recommendation_frame,
)
from llmrec_assets.ground.store import checkpoint_version

#: Decoding of lists that leave out every film rated by the cut-off, as a deployed system would.
RANKING = "ranking"
#: Decoding of lists that leave out only what the prompt shows: all that free text can know.
RANKING_SHOWN = "ranking-shown"

#: What a recommender sees of a window: the films its prompt shows, or all up to the cut-off.
INFORMATION_SETS = ("prompt", "history")


@dataclass(frozen=True)
class Window:
    """What a recommender is told of one test or validation window.

    ``films`` are canonical, oldest first, each with its liked mark in ``liked``; ``hidden`` are
    the films a list must not hold.
    """

    user_id: int
    window_index: int
    cutoff_timestamp: int
    films: tuple[int, ...]
    liked: tuple[bool, ...]
    hidden: frozenset[int]

    @property
    def key(self) -> tuple[int, int]:
        return self.user_id, self.window_index

    def evidence(self, only_liked: bool, last: int | None = None) -> list[int]:
        """Distinct films among the ``last`` told, oldest first; the liked ones alone, or all."""
        told = list(zip(self.films, self.liked, strict=True))[-(last or len(self.films)) :]
        return list(dict.fromkeys(film for film, like in told if like or not only_liked))


class Recommender(Protocol):
    """Ranked, distinct, canonical ids of catalogue films, none of them hidden; the same lists
    again for the same fit and the same windows, whatever their order."""

    def recommend(self, windows: Sequence[Window], top_k: int) -> list[list[int]]:
        """One list a window, best first: ``top_k`` films, fewer only where the catalogue ends."""
        ...


@dataclass(frozen=True)
class Candidates:
    """Films that another recommender puts forward: canonical ids by (user id, window index).

    ``fit``: what tells this recommender from others of its kind, JSON values.
    """

    films: Mapping[tuple[int, int], frozenset[int]]
    fit: Mapping[str, Any]

    @property
    def version(self) -> str:
        """Changes with the films of any window, and with the fit."""
        films = [[*key, *sorted(own)] for key, own in sorted(self.films.items())]
        return checkpoint_version("candidates", {"films": films, "fit": dict(self.fit)})


def windows_of(
    prompts: pd.DataFrame,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    seen: Seen,
    *,
    information_set: str,
    liked_min: int,
    shown_per_class: int | None = None,
) -> list[Window]:
    """The prompts' windows as a recommender sees them, in the prompts' order.

    Args:
        prompts: ``PROMPTS``.
        ratings: ``RATINGS``.
        movies: ``MOVIES``.
        seen: ``seen_sets`` of these windows; they are hidden.
        information_set: ``prompt``: the films the prompt shows; ``history``: all up to the
            cut-off. Films that share a time are ordered by id, as in the window.
        liked_min: rating from which a film is liked.
        shown_per_class: a prompt names at most the last so many liked and disliked films of the
            context (template ``figure2``); ``None``: all.

    Raises:
        KeyError: ``seen`` lacks a window.
        ValueError: there is no such information set.
    """
    if information_set not in INFORMATION_SETS:
        raise ValueError(f"information_set {information_set!r} is none of {INFORMATION_SETS}")
    film_of = canonical_ids(movies)
    histories = _histories(ratings, set(prompts["user_id"].tolist()))
    columns = [prompts[name].tolist() for name in (*WINDOW_KEY, "cutoff_timestamp")]
    contexts = prompts["context_movie_ids"].tolist()
    windows = []
    for user, index, cutoff, context in zip(*columns, contexts, strict=True):
        known = [(i, r >= liked_min) for t, i, r in histories.get(user, []) if t <= cutoff]
        if information_set == "prompt":
            liked_of = dict(known)
            known = _shown([(int(i), liked_of[int(i)]) for i in context], shown_per_class)
        windows.append(
            Window(
                user_id=user,
                window_index=index,
                cutoff_timestamp=cutoff,
                films=tuple(film_of.get(i, i) for i, _ in known),
                liked=tuple(like for _, like in known),
                hidden=seen[user, index],
            )
        )
    return windows


def _histories(ratings: pd.DataFrame, users: Collection[int]) -> dict[int, list[tuple]]:
    """(time, movie id, rating) of these users, in the order of windows."""
    histories: dict[int, list[tuple]] = {}
    wanted = ratings[ratings["user_id"].isin(users)].sort_values(
        ["user_id", "timestamp", "movie_id", "rating"]
    )
    columns = [wanted[name].tolist() for name in ("user_id", "timestamp", "movie_id", "rating")]
    for user, *event in zip(*columns, strict=True):
        histories.setdefault(user, []).append(tuple(event))
    return histories


def _shown(context: list[tuple[int, bool]], per_class: int | None) -> list[tuple[int, bool]]:
    if per_class is None:
        return context
    last = {
        like: [position for position, (_, own) in enumerate(context) if own == like][-per_class:]
        for like in (True, False)
    }
    return [context[position] for position in sorted(last[True] + last[False])]


def recommended_frame(
    windows: Sequence[Window],
    lists: Sequence[Sequence[int]],
    seen: Seen,
    title_of: Mapping[int, str],
    *,
    stage: str,
    decoding: str,
    information_set: str,
    top_k: int,
    prompts_version: str,
    answer_version: str | None = None,
) -> pd.DataFrame:
    """``RECOMMENDATIONS`` of lists of canonical ids, one a window; a short list ends in
    ``missing`` slots."""
    rows = []
    for window, films in zip(windows, lists, strict=True):
        better: set[int] = set()
        for rank in range(1, top_k + 1):
            film = films[rank - 1] if rank <= len(films) else None
            rows.append(
                (
                    *window.key,
                    stage,
                    decoding,
                    information_set,
                    rank,
                    None if film is None else title_of.get(film),
                    film,
                    "missing" if film is None else "id",
                    None,
                    film in better,
                    film in seen[window.key],
                    prompts_version,
                    None,
                    answer_version,
                )
            )
            if film is not None:
                better.add(film)
    return recommendation_frame(rows)


def contract_problems(
    recommendations: pd.DataFrame, seen: Seen, catalogue_ids: Collection[int], top_k: int
) -> list[str]:
    """Where a table of lists breaks the contract of ``Recommender``.

    Every list has exactly the ranks 1 to ``top_k``; its films are distinct, in the catalogue under
    their canonical id, and not in ``seen``; a slot is empty only where no film was left. Works on
    any ``RECOMMENDATIONS``: a constrained LLM's rows keep the same contract.

    Args:
        recommendations: ``RECOMMENDATIONS`` of one or several recommenders.
        seen: films a list must not hold, by (user id, window index): ``seen_sets``.
        catalogue_ids: canonical ids of all films that can be recommended.
        top_k: slots per window.

    Returns:
        One sentence per problem, naming list, user and window; empty where there is none.
    """
    catalogue, problems = set(catalogue_ids), []
    for place, key, ranks, films in _lists(recommendations):
        if ranks != list(range(1, top_k + 1)):
            problems.append(f"{place}: its ranks are {ranks}, expected 1 to {top_k} once each")
        if key not in seen:
            problems.append(f"{place}: no such window, so that nothing can be told of its films")
            continue
        given = [film for film in films if film is not None]
        if films[: len(given)] != given:
            problems.append(f"{place}: an empty slot stands before a film")
        free = len(catalogue - seen[key])
        if len(given) < min(top_k, free):
            problems.append(f"{place}: {len(given)} films, expected {min(top_k, free)}")
        repeated = sorted({film for film in given if given.count(film) > 1})
        absent = sorted(set(given) - catalogue)
        known = sorted(set(given) & seen[key])
        for found, meaning in (
            (repeated, "repeated"),
            (absent, "in the catalogue under no canonical id"),
            (known, "already seen"),
        ):
            if found:
                problems.append(f"{place}: film {', '.join(map(str, found))} is {meaning}")
    return problems


def _lists(
    recommendations: pd.DataFrame,
) -> Iterator[tuple[str, tuple[int, int], list[int], list[int | None]]]:
    """(place, window key, ranks, films by rank) of every list."""
    ordered = recommendations.sort_values([*LIST_KEY, *WINDOW_KEY, "rank"], kind="stable")
    for name, rows in ordered.groupby([*LIST_KEY, *WINDOW_KEY], sort=False):
        stage, decoding, information_set, *window = name
        user, index = map(int, map(str, window))
        place = f"{stage} ({decoding}, {information_set}), user {user}, window {index}"
        films = [None if pd.isna(film) else int(film) for film in rows["movie_id"].tolist()]
        yield place, (user, index), rows["rank"].tolist(), films
