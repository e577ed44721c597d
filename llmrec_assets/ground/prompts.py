"""Prompts: an interaction window put into words.

What belongs here: the templates and what they say about a user and a window. What does not: which
films a window holds (``windows``), how the answer is written and read (``completions``) and a
model's chat template (the models' floor); a prompt is the user message alone.

A prompt says nothing that was unknown at its window's cut-off: films are asked for up to that
day, never up to the end of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from llmrec_assets.ground.completions import render_completion
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.recipes import PromptRecipe, WindowRecipe
from llmrec_assets.ground.schemas import PROMPTS

_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_GENDERS = {"M": "male", "F": "female"}
#: What a prompt takes from its window.
_ASKED = (
    *("user_id", "window_index", "cutoff_timestamp"),
    *("context_movie_ids", "context_ratings", "ground_truth_movie_ids"),
)


@dataclass(frozen=True)
class Film:
    title: str
    genres: tuple[str, ...] = ()

    @cached_property
    def line(self) -> str:
        """The film in a list of films; popular ones stand in thousands of prompts."""
        return f"- {self.title}" + (f" [{', '.join(self.genres)}]" if self.genres else "")


@dataclass(frozen=True)
class Question:
    """What a template may say. Films stand oldest first, as in the window."""

    age: str | None
    gender: str | None
    occupation: str
    place: str | None
    liked: tuple[Film, ...]
    disliked: tuple[Film, ...]
    top_k: int
    cutoff: str
    max_per_class: int


def render_prompts(
    windows: pd.DataFrame,
    users: pd.DataFrame,
    movies: pd.DataFrame,
    recipe: PromptRecipe,
    window_recipe: WindowRecipe,
) -> pd.DataFrame:
    """One prompt and its completion per window, in the windows' order (columns of ``PROMPTS``).

    A rating of at least ``window_recipe.liked_min`` is liked, any other disliked. The completion
    lists the ground truth, so parsing it gives back the titles exactly.

    Raises:
        DataError: a window names a user or a film that ``users`` or ``movies`` lacks.
    """
    template = TEMPLATES[recipe.template]
    profiles = _profiles(users)
    films = {
        movie_id: Film(title.strip(), tuple(genres))
        for movie_id, title, genres in zip(
            movies["movie_id"], movies["title"], movies["genres"], strict=True
        )
    }
    liked_min = window_recipe.liked_min
    prompts: list[str] = []
    completions: list[str] = []
    columns = (windows[name].tolist() for name in _ASKED)
    for user_id, window_index, cutoff, context_ids, ratings, truth_ids in zip(
        *columns, strict=True
    ):
        try:
            profile = profiles[user_id]
            context = [films[movie_id] for movie_id in _numbers(context_ids)]
            truth = [films[movie_id].title for movie_id in _numbers(truth_ids)]
        except KeyError as error:
            raise DataError(
                f"prompts: the window {window_index} of user {user_id} needs id "
                f"{error.args[0]}, which is not in users or movies; materialize users, movies and "
                "interaction_windows of one data set together"
            ) from error
        liked: list[Film] = []
        disliked: list[Film] = []
        for film, rating in zip(context, _numbers(ratings), strict=True):
            (liked if rating >= liked_min else disliked).append(film)
        question = Question(
            **profile,
            liked=tuple(liked),
            disliked=tuple(disliked),
            top_k=window_recipe.top_k,
            cutoff=render_date(int(cutoff)),
            max_per_class=recipe.max_per_class,
        )
        prompts.append(template(question))
        completions.append(render_completion(truth))
    table = windows.reset_index(drop=True).assign(
        template=recipe.template,
        prompt=pd.Series(prompts, dtype="str"),
        completion=pd.Series(completions, dtype="str"),
    )
    return table[PROMPTS.names]


def figure2(question: Question) -> str:
    """Paper, Figure 2: role, profile, recent likes and dislikes with genres, and the request.

    It follows the figure's content (who the user is and where from, at most ``max_per_class``
    liked and disliked films, ``top_k`` ranked films released up to the cut-off, none of them
    listed already, in a fixed format); the wording is ours, not the figure's letter.
    """
    about = _sentence(
        [question.age, question.gender, f"occupation: {question.occupation}"], question.place
    )
    lines = [
        "You are a movie recommender system.",
        f"The user: {about}.",
        *_listing("Films the user liked", question.liked, question.max_per_class),
        *_listing("Films the user disliked", question.disliked, question.max_per_class),
        f"Recommend the {question.top_k} films the user would most like to watch next, the best "
        f"first. Recommend only films released up to {question.cutoff} and none of the films "
        "listed above.",
        f"Answer only with a JSON list of exactly {question.top_k} titles in double quotes, each "
        'with its year, such as ["Title (Year)", "Title (Year)"].',
    ]
    return "\n".join(lines)


def compact(question: Question) -> str:
    """Few tokens for a small model on a CPU: the whole context, titles and class only."""
    about = _sentence([question.age, question.gender, question.occupation], question.place)
    lines = [f"User: {about}."]
    for word, films in (("Liked", question.liked), ("Disliked", question.disliked)):
        if films:
            lines.append(f"{word}: {'; '.join(film.title for film in films)}.")
    lines.append(
        f"Recommend {question.top_k} other films released up to {question.cutoff}, best first, as "
        "a JSON list of titles with years."
    )
    return "\n".join(lines)


#: Template by the name a recipe gives.
TEMPLATES: dict[str, Callable[[Question], str]] = {"figure2": figure2, "compact": compact}


def render_date(timestamp: int) -> str:
    """Unix seconds as a day in UTC, ``12 March 1998``, whatever the machine's locale."""
    day = datetime.fromtimestamp(timestamp, tz=UTC)
    return f"{day.day} {_MONTHS[day.month - 1]} {day.year}"


def _sentence(parts: Iterable[str | None], place: str | None) -> str:
    said = [part for part in parts if part]
    return ", ".join([*said, f"from {place}"] if place else said)


def _listing(heading: str, films: tuple[Film, ...], most: int) -> list[str]:
    if not films:
        return []
    lines = [f"{heading}, the most recent last:"]
    return lines + [film.line for film in films[-most:]]


def _profiles(users: pd.DataFrame) -> dict[int, dict[str, Any]]:
    """By user id, the part of a ``Question`` that a row of ``users`` answers."""
    told = (users[name].tolist() for name in ("user_id", "gender", "occupation"))
    known = (_known(users, name) for name in ("age", "age_band", "city", "state"))
    profiles = {}
    for user_id, gender, occupation, age, band, *place in zip(*told, *known, strict=True):
        profiles[user_id] = {
            "age": _age(age, band),
            "gender": _GENDERS.get(gender),
            "occupation": str(occupation),
            "place": ", ".join(str(part) for part in place if part is not None) or None,
        }
    return profiles


def _known(users: pd.DataFrame, name: str) -> list[Any]:
    """The column as Python values, whatever pandas keeps it in; ``None`` where nothing is known.

    Whole columns: asking pandas cell by cell takes ten times as long.
    """
    if name not in users:
        return [None] * len(users)
    known = users[name].notna().tolist()
    values = users[name].astype(object).tolist()
    return [
        value if know and str(value).strip() else None
        for value, know in zip(values, known, strict=True)
    ]


def _age(age: Any, band: Any) -> str | None:
    if age is not None:
        return f"{int(age)} years old"
    if band is None:
        return None
    band = str(band).strip()
    if band.casefold().startswith("under"):
        return band.casefold()
    return f"{band[:-1]} years or older" if band.endswith("+") else f"{band} years old"


def _numbers(cell: Any) -> list[int]:
    """A list cell as Python numbers, whether it came as list or array."""
    return np.asarray(cell).tolist()
