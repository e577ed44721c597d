"""Histories of users who ask for recommendations: from the data set, or from a file of their own.

What belongs here: reading them, and refusing them with row and remedy. What does not: what is asked
with them (``serving``) and answered (the models floor).

A file is CSV, JSON lines or Parquet, one row a rating: ``user_id``, ``movie_id`` or ``title``,
``rating`` (1 to 5), and, if known, ``timestamp`` (Unix seconds; without it the rows stand oldest
first). A file that names no film is a list of users of the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.grounding import Catalogue, Grounder
from llmrec_assets.ground.recipes import GroundingRecipe
from llmrec_assets.ground.recommendations import typed
from llmrec_assets.ground.schemas import RATINGS, USERS

_READERS = {".csv": "CSV", ".jsonl": "JSON lines", ".parquet": "Parquet"}
_MOST_SHOWN = 10


@dataclass(frozen=True)
class Histories:
    """Who asks and what they have rated. ``labels``: what a user id is called in the answer;
    ``ratings``: ``RATINGS``; ``users``: ``USERS``, one row for each of them; ``of_data_set``: the
    ids are the data set's."""

    labels: dict[int, str]
    ratings: pd.DataFrame
    users: pd.DataFrame
    of_data_set: bool


def known_histories(
    user_ids: Sequence[int], ratings: pd.DataFrame, users: pd.DataFrame, dataset: str
) -> Histories:
    """Users of the data set, with all that they have rated.

    Args:
        ratings: ``RATINGS``, and ``users``: ``USERS``, of the data set.

    Raises:
        DataError: one is not in the data set, or has rated nothing.
    """
    wanted = list(dict.fromkeys(user_ids))
    there, rated = set(users["user_id"].tolist()), set(ratings["user_id"].tolist())
    first, last = int(users["user_id"].min()), int(users["user_id"].max())
    remedy = "give a history in a file: --users FILE with user_id, title and rating"
    problems = [
        f"user {user} is not in {dataset} (its users are {first} to {last})"
        if user not in there
        else f"user {user} has rated nothing in {dataset}, so there is no history to ask with"
        for user in wanted
        if user not in there or user not in rated
    ]
    if problems:
        raise DataError(_told(problems) + f"; {remedy}")
    return Histories(
        {user: str(user) for user in wanted},
        ratings[ratings["user_id"].isin(wanted)],
        users[users["user_id"].isin(wanted)],
        of_data_set=True,
    )


def read_histories(
    path: Path, ratings: pd.DataFrame, users: pd.DataFrame, catalogue: pd.DataFrame, dataset: str
) -> Histories:
    """A file of users of the data set, or of anybody's histories.

    A user whose history the file gives is asked about with that history alone and without a
    profile, whether or not the data set has a user of that id.

    Args:
        ratings: ``RATINGS``, and ``users``: ``USERS``, of the data set.
        catalogue: ``CATALOGUE``, for the films.

    Raises:
        DataError: the file cannot be read, or a row names no film of the catalogue, no rating, or
            no user; the first ten rows are named.
    """
    frame = _read(path)
    if frame.empty:
        raise DataError(f"{path.name} holds no row: give one row a rating, or one row a user")
    if "user_id" not in frame:
        raise DataError(
            f"{path.name} has no column user_id (it has {', '.join(map(str, frame.columns))})"
        )
    if not {"movie_id", "title"} & set(frame.columns):
        return known_histories(_user_ids(frame, path.name), ratings, users, dataset)
    if "rating" not in frame:
        raise DataError(
            f"{path.name} has no column rating: 1 to 5 stars say what was liked, and a history "
            "without them says nothing"
        )
    latest = int(ratings["timestamp"].max())
    films = _Films(catalogue, dataset)
    rows, problems = [], []
    numbers: dict[str, int] = {}
    rated: dict[tuple[str, int], int] = {}
    for position, row in enumerate(frame.to_dict("records"), start=1):
        try:
            label = _text(row["user_id"])
            if label is None:
                raise ValueError("names no user")
            film = films.find(_text(row.get("movie_id")), _text(row.get("title")))
            rating = _whole(row["rating"], "rating", 1, 5)
            timed = "timestamp" in row
            time = _whole(row["timestamp"], "timestamp", 0, 2**40) if timed else latest
            first = rated.setdefault((label, film), position)
            if first != position:
                raise ValueError(f"rates the film of row {first} again: keep one of them")
        except ValueError as error:
            problems.append(f"row {position} of {path.name} {error}")
            continue
        rows.append((numbers.setdefault(label, len(numbers) + 1), film, rating, time))
    if problems:
        raise DataError(_told(problems))
    own = pd.DataFrame(rows, columns=RATINGS.names)
    if "timestamp" not in frame:  # a second apart, the last one when the data set ends
        own["timestamp"] = latest - own[::-1].groupby("user_id").cumcount()
    profiles = pd.DataFrame({name: None for name in USERS.names}, index=range(len(numbers)))
    # "other" is what both MovieLens sets call an occupation that is not given.
    profiles = profiles.assign(user_id=list(numbers.values()), gender="", occupation="other")
    return Histories(
        {number: label for label, number in numbers.items()},
        typed(own, RATINGS),
        typed(profiles.assign(zip_code=""), USERS),
        of_data_set=False,
    )


def _read(path: Path) -> pd.DataFrame:
    if path.suffix.lower() not in _READERS:
        kinds = ", ".join(f"{suffix} ({kind})" for suffix, kind in _READERS.items())
        raise DataError(f"{path.name}: a file of users ends in {kinds}")
    try:
        if path.suffix.lower() == ".csv":
            return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            return pd.read_json(path, lines=True, dtype=False, convert_dates=False)
        return pd.read_parquet(path)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (ValueError, OSError) as error:
        kind = _READERS[path.suffix.lower()]
        raise DataError(f"{path.name} cannot be read as {kind}: {error}") from error


def _user_ids(frame: pd.DataFrame, name: str) -> list[int]:
    ids, problems = [], []
    for position, value in enumerate(frame["user_id"].tolist(), start=1):
        try:
            ids.append(_whole(value, "user_id", 0, 2**31 - 1))
        except ValueError as error:
            problems.append(f"row {position} of {name} {error}")
    if problems:
        raise DataError(
            _told(problems) + "; without a column movie_id or title, the users must be the data "
            "set's"
        )
    return ids


class _Films:
    """Films of the catalogue by id or title. Nothing is guessed: a title that is merely similar is
    offered in the refusal."""

    def __init__(self, catalogue: pd.DataFrame, dataset: str) -> None:
        self._ids = set(catalogue["movie_id"].tolist())
        ids, titles = catalogue["movie_id"].tolist(), catalogue["title"].tolist()
        self._title_of = dict(zip(ids, titles, strict=True))
        self._grounder = Grounder(Catalogue(catalogue), GroundingRecipe())
        self._dataset = dataset

    def find(self, movie_id: str | None, title: str | None) -> int:
        if movie_id is not None:
            found = _whole(movie_id, "movie_id", 0, 2**31 - 1)
            if found not in self._ids:
                raise ValueError(
                    f"has movie_id {found}, which is no film of {self._dataset} "
                    f"({len(self._ids):,} films; ids and titles: llmrec sql "
                    '"select movie_id, title from movies")'
                )
            return found
        if title is None:
            raise ValueError("names no film: give its movie_id or its title")
        (match,) = self._grounder.ground([title])
        if match.movie_id is None or match.method == "similar":
            meant = "" if match.movie_id is None else f': did you mean "{self._name(match)}"?'
            raise ValueError(
                f'has the title "{title}", which is no film of {self._dataset}'
                + (meant or ', as titles stand there: "Net, The (1995)"')
            )
        return match.movie_id

    def _name(self, match: Any) -> str:
        return str(self._title_of[match.movie_id])


def _text(value: Any) -> str | None:
    """A cell as text; None where it is empty."""
    if value is None or (isinstance(value, float) and value != value) or value is pd.NA:
        return None
    if isinstance(value, float) and value.is_integer():  # a column with gaps came as floats
        value = int(value)
    return str(value).strip() or None


def _whole(value: Any, name: str, low: int, high: int) -> int:
    text = _text(value)
    try:
        number = int(text or "")
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        bounds = f" from {low} to {high}" if high <= 5 else ""
        given = f"has {name} {text!r}" if text is not None else f"has no {name}"
        raise ValueError(f"{given}, expected a whole number{bounds}")
    return number


def _told(problems: Sequence[str]) -> str:
    more = len(problems) - _MOST_SHOWN
    return "; ".join(problems[:_MOST_SHOWN]) + (f"; and {more:,} more" if more > 0 else "")
