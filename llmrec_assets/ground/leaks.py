"""Checks that nothing a recommender is asked to foresee has reached it.

What belongs here: pure functions that name every problem they find; an empty list means there is
none. They are written with plain loops and sets, without the code of ``windows``, so that they
catch its mistakes. What does not: the Dagster asset checks that call them and block on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llmrec_assets.ground.recipes import WindowRecipe

if TYPE_CHECKING:
    import pandas as pd

_KEY = ["user_id", "window_index"]


@dataclass(frozen=True)
class _Interaction:
    timestamp: int
    movie_id: int
    rating: int
    film: int
    """canonical movie id"""


def user_split_problems(user_splits: pd.DataFrame) -> list[str]:
    """Users that stand in ``USER_SPLITS`` more than once, or in a split that does not exist."""
    problems = []
    for user_id, rows in user_splits.groupby("user_id", sort=True):
        if len(rows) > 1:
            names = ", ".join(sorted(rows["split"]))
            problems.append(f"user {user_id} stands in {len(rows)} splits: {names}")
    for split in sorted(set(user_splits["split"]) - {"train", "validation", "test"}):
        problems.append(f"unknown split {split!r}")
    return problems


def window_problems(
    windows: pd.DataFrame,
    ratings: pd.DataFrame,
    user_splits: pd.DataFrame,
    canonical: pd.DataFrame | None,
    recipe: WindowRecipe,
) -> list[str]:
    """Everything in ``INTERACTION_WINDOWS`` that the ratings or the recipe contradict.

    Held against: the context is exactly the last ``window_size`` interactions up to the cut-off;
    ``n_history`` counts what is not after it; the cut-off is valid; the ground truth is liked,
    strictly later, of films not in the history and without repeats; the split is the user's own
    and no user stands in two; cut-offs are distinct and numbered by time. Under the protocol
    ``temporal`` also: a training window's cut-off and ground truth lie at or before the global
    time, the other windows' cut-offs at or after it.

    Args:
        windows: ``INTERACTION_WINDOWS``.
        ratings: ``RATINGS`` the windows were drawn from.
        user_splits: ``USER_SPLITS``.
        canonical: ``movie_id`` and ``canonical_movie_id``; ``None``: every id is its own film.
        recipe: the recipe the windows were drawn with.

    Returns:
        One sentence per problem, each naming user and window.
    """
    problems = user_split_problems(user_splits)
    split_of = dict(zip(user_splits["user_id"], user_splits["split"], strict=True))
    histories = _histories(ratings, set(windows["user_id"]), canonical)
    split_time = _split_time(ratings, recipe)
    for row in windows.to_dict("records"):
        user = row["user_id"]
        place = f"user {user}, window {row['window_index']}: "
        # by the user's own split, so that a window filed under another cannot vouch for itself
        trains = split_of.get(user) == "train"
        history = histories.get(user, [])
        found = []
        if split_time is not None:
            found += _time_problems(row, history, trains, split_time)
            if trains:
                history = [i for i in history if i.timestamp <= split_time]
        found += _one_window(row, history, recipe)
        if split_of.get(user) != row["split"]:
            found.append(f"split is {row['split']!r}, the user's is {split_of.get(user)!r}")
        problems += [place + problem for problem in found]
    return problems + _numbering_problems(windows)


def _one_window(
    row: dict[Any, Any], history: Sequence[_Interaction], recipe: WindowRecipe
) -> list[str]:
    """``row`` is one of ``INTERACTION_WINDOWS``; ``history`` is ordered by time."""
    problems = []
    cutoff = row["cutoff_timestamp"]
    upto = [i for i in history if i.timestamp <= cutoff]
    after = [i for i in history if i.timestamp > cutoff]
    rated_after = {i.movie_id for i in after}

    context = _ids(row["context_movie_ids"])
    late = [movie_id for movie_id in context if movie_id in rated_after]
    if late:
        problems.append(f"context holds films rated after the cut-off: {late}")
    expected = upto[-recipe.window_size :]
    if context != [i.movie_id for i in expected]:
        problems.append(f"context is not the last {recipe.window_size} films up to the cut-off")
    if _ids(row["context_ratings"]) != [i.rating for i in expected]:
        problems.append("context_ratings are not the ratings of the context")
    if row["n_history"] != len(upto):
        problems.append(f"n_history is {row['n_history']}, {len(upto)} are not after the cut-off")

    seen_films = {i.film for i in upto}
    following = _following_liked(history, cutoff, recipe.liked_min)
    n_liked = sum(i.rating >= recipe.liked_min for i in upto)
    enough = (n_liked >= recipe.min_per_class, len(upto) - n_liked >= recipe.min_per_class)
    if not upto or upto[-1].timestamp != cutoff:
        problems.append(f"nothing was rated at the cut-off {cutoff}")
    if not (all(enough) if recipe.balance == "both" else any(enough)):
        problems.append(
            f"cut-off is not valid: {n_liked} liked and {len(upto) - n_liked} disliked up to it"
        )
    if len(following) < recipe.min_ground_truth:
        problems.append(f"cut-off is not valid: {len(following)} liked films follow it")

    later = {i.movie_id: i for i in after}
    film_of = {i.movie_id: i.film for i in history}
    ground_truth = _ids(row["ground_truth_movie_ids"])
    for movie_id in ground_truth:
        if movie_id not in later:
            problems.append(f"ground truth {movie_id} was not rated after the cut-off")
        elif later[movie_id].rating < recipe.liked_min:
            problems.append(f"ground truth {movie_id} was not liked")
        if film_of.get(movie_id, movie_id) in seen_films:
            problems.append(f"ground truth {movie_id} is a film of the history")
    if len({film_of.get(movie_id, movie_id) for movie_id in ground_truth}) < len(ground_truth):
        problems.append("ground truth repeats a film")
    if ground_truth != [i.movie_id for i in following[: recipe.top_k]]:
        problems.append(f"ground truth is not the next {recipe.top_k} liked films")
    return problems


def _split_time(ratings: pd.DataFrame, recipe: WindowRecipe) -> int | None:
    """The global time of the protocol ``temporal``, counted rating by rating."""
    if recipe.protocol != "temporal" or recipe.temporal_time is not None:
        return recipe.temporal_time if recipe.protocol == "temporal" else None
    times = sorted(ratings["timestamp"].tolist())
    enough = recipe.temporal_quantile * len(times)
    return next((time for made, time in enumerate(times, start=1) if made >= enough), None)


def _time_problems(
    row: dict[Any, Any], history: Sequence[_Interaction], trains: bool, split_time: int
) -> list[str]:
    """``history`` is all of the user's, whatever training may look at."""
    cutoff = row["cutoff_timestamp"]
    if not trains:
        if cutoff < split_time:
            return [f"cut-off {cutoff} lies before the global time {split_time}"]
        return []
    problems = []
    if cutoff > split_time:
        problems.append(f"training cut-off {cutoff} lies after the global time {split_time}")
    late = {i.movie_id for i in history if i.timestamp > split_time}
    found = [movie_id for movie_id in _ids(row["ground_truth_movie_ids"]) if movie_id in late]
    if found:
        problems.append(f"training ground truth was rated after the global time: {found}")
    return problems


def _following_liked(
    history: Sequence[_Interaction], cutoff: int, liked_min: int
) -> list[_Interaction]:
    """Liked films after the cut-off, each film at its first rating, in order."""
    films: set[int] = set()
    following = []
    for i in history:
        if i.film not in films and i.timestamp > cutoff and i.rating >= liked_min:
            following.append(i)
        films.add(i.film)
    return following


def _histories(
    ratings: pd.DataFrame, users: set[int], canonical: pd.DataFrame | None
) -> dict[int, list[_Interaction]]:
    film_of: dict[int, int] = {}
    if canonical is not None:
        film_of = dict(
            zip(
                canonical["movie_id"].tolist(),
                canonical["canonical_movie_id"].tolist(),
                strict=True,
            )
        )
    histories: dict[int, list[_Interaction]] = {}
    wanted = ratings[ratings["user_id"].isin(users)]
    columns = [wanted[name].tolist() for name in ("user_id", "timestamp", "movie_id", "rating")]
    for user_id, timestamp, movie_id, rating in zip(*columns, strict=True):
        histories.setdefault(user_id, []).append(
            _Interaction(timestamp, movie_id, rating, film_of.get(movie_id, movie_id))
        )
    for history in histories.values():
        history.sort(key=lambda i: (i.timestamp, i.movie_id, i.rating))
    return histories


def _numbering_problems(windows: pd.DataFrame) -> list[str]:
    problems = []
    for user_id, rows in windows.groupby("user_id", sort=True):
        rows = rows.sort_values("window_index")
        if rows["window_index"].tolist() != list(range(len(rows))):
            problems.append(f"user {user_id}: windows are not numbered 0 to {len(rows) - 1}")
        if any(a >= b for a, b in pairwise(rows["cutoff_timestamp"].tolist())):
            problems.append(f"user {user_id}: cut-offs repeat or are not numbered by time")
    return problems


def prompt_problems(
    prompts: pd.DataFrame, windows: pd.DataFrame, movies: pd.DataFrame
) -> list[str]:
    """Everything in ``PROMPTS`` that differs from its window or gives the answer away.

    A ground truth title counts as given away when it stands in the prompt text by itself; inside
    a longer context title ("Heat (1995)" in "Body Heat (1995)") it does not.

    Args:
        prompts: ``PROMPTS``.
        windows: ``INTERACTION_WINDOWS`` they were rendered from.
        movies: ``MOVIES``, for the titles.

    Returns:
        One sentence per problem, each naming user and window.
    """
    title_of, genres_of = _titles_and_genres(movies)
    window_of = {(row["user_id"], row["window_index"]): row for row in windows.to_dict("records")}
    keys = list(zip(*(prompts[name].tolist() for name in _KEY), strict=True))
    problems = [
        f"user {user_id}, window {index}: has a window and no prompt"
        for user_id, index in sorted(set(window_of) - set(keys))
    ]
    if len(set(keys)) < len(keys):
        problems.append(f"{len(keys) - len(set(keys))} windows have more than one prompt")
    for key, row in zip(keys, prompts.to_dict("records"), strict=True):
        place = f"user {key[0]}, window {key[1]}: "
        window = window_of.get(key)
        if window is None:
            problems.append(place + "has a prompt and no window")
            continue
        for name in ("context_movie_ids", "ground_truth_movie_ids"):
            if _ids(row[name]) != _ids(window[name]):
                problems.append(f"{place}{name} differ from the window's")
        for name in ("split", "cutoff_timestamp"):
            if row[name] != window[name]:
                problems.append(f"{place}{name} differs from the window's")
        # the window's own ids, so that a prompt with wrong ids cannot vouch for itself
        given_away = _titles_in(
            _without_genres(row["prompt"], _ids(window["context_movie_ids"]), genres_of),
            _ids(window["ground_truth_movie_ids"]),
            _ids(window["context_movie_ids"]),
            title_of,
        )
        problems += [f"{place}the prompt names ground truth {title!r}" for title in given_away]
    return problems


def _titles_and_genres(movies: pd.DataFrame) -> tuple[dict[int, str], dict[int, str]]:
    ids = movies["movie_id"].tolist()
    titles = [title.strip() for title in movies["title"].tolist()]
    genres = [", ".join(names) for names in movies["genres"].tolist()]
    return dict(zip(ids, titles, strict=True)), dict(zip(ids, genres, strict=True))


def _without_genres(text: str, context: Iterable[int], genres_of: Mapping[int, str]) -> str:
    """ML-100K has a film titled "unknown" and a genre of that name: only the film is a leak."""
    for genres in {genres_of.get(movie_id, "") for movie_id in context} - {""}:
        text = text.replace(f"[{genres}]", "")
    return text


def _titles_in(
    text: str, wanted: Iterable[int], context: Iterable[int], title_of: Mapping[int, str]
) -> list[str]:
    """Titles of ``wanted`` that stand in ``text`` outside a longer title of ``context``."""
    context_titles = [title_of[movie_id] for movie_id in context if movie_id in title_of]
    found = []
    for title in (title_of[movie_id] for movie_id in wanted if movie_id in title_of):
        if title not in text:
            continue
        rest = text
        for longer in sorted(context_titles, key=len, reverse=True):
            if title in longer and title != longer:
                rest = rest.replace(longer, "")
        if re.search(rf"(?<!\w){re.escape(title)}(?!\w)", rest):
            found.append(title)
    return found


def _ids(values: Iterable[int]) -> list[int]:
    """A list cell as Python ints, whether it came as list, array or Arrow values."""
    return [int(value) for value in values]
