"""Does a model know MovieLens by heart? The questions, what guessing gets, and the score.

What belongs here: rows of the source's own files turned into questions, their control, and
counting hits. What does not: asking a model (``models.memorisation``), and what a model shown
invented titles still recommends (``catalogue``).

After D. Di Palma, F. A. Merra, M. Sfilio, V. W. Anelli, F. Narducci, T. Di Noia, "Do LLMs
Memorize Recommendation Datasets? A Preliminary Study on MovieLens-1M", SIGIR 2025
(arXiv:2505.10212), who ask chat models for films, user profiles and interactions. Ours differ in
three ways: the model continues the files' raw rows, not a chat; every task has a control, the
same rows with other ids, because a model that can merely continue a format or copy a column
hits there too; and every share has an exact interval and a baseline. Only ``source`` above
``control`` speaks of memory, and of ``next title`` with a grain of salt: neighbours in the file
resemble each other, which a model may know without knowing the file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pandas as pd

from llmrec_assets.ground.binomial import clopper_pearson
from llmrec_assets.ground.formats import FORMATS
from llmrec_assets.ground.recipes import ProbeRecipe
from llmrec_assets.ground.schemas import MEMORISATION
from llmrec_assets.ground.text_rows import read_text
from llmrec_assets.ground.titles import normalise_title

TITLE_TASKS = ("next title", "title of id")
CONDITIONS = ("source", "control")

#: The control adds up to this to the ids of rating rows.
_FURTHEST = 999

_T = TypeVar("_T")
_Row = list[str]
#: Rows by condition.
_Films = dict[str, list[_Row]]
_USER, _MOVIE, _RATING = 0, 1, 2  # columns of a rating row
_TITLE = 1  # column of a film row; 0 is the id


@dataclass(frozen=True)
class SourceRows:
    """The fields of every film and rating row, in file order, and the files' separators."""

    movies: list[_Row]
    ratings: list[_Row]
    separator: str
    ratings_separator: str


@dataclass(frozen=True)
class Question:
    """One row to complete. ``prompt`` ends where the answer begins; ``answer`` is what the rows
    say, ``guess`` what the task's baseline answers. Holds rows of the source: never published."""

    task: str
    condition: str
    prompt: str
    answer: str
    guess: str
    separator: str


def read_source_rows(directory: Path, dataset: str) -> SourceRows:
    """Reads the film and rating rows as they stand in the files.

    Raises:
        DataError: a file is missing or empty.
    """
    form = FORMATS[dataset]

    def fields(file: str, table: str, separator: str) -> list[_Row]:
        text = read_text(directory / file, table).decode("latin-1")
        return [line.split(separator) for line in text.split("\n")]

    return SourceRows(
        fields(form.movies, "movies", form.separator),
        fields(form.ratings, "ratings", form.ratings_separator),
        form.separator,
        form.ratings_separator,
    )


def memorisation_questions(rows: SourceRows, recipe: ProbeRecipe, seed: int) -> list[Question]:
    """The questions of all tasks under both conditions; the same rows are asked in both.

    ``next title``: ``context_rows`` whole rows of the films' file, then the next row's id.
    ``title of id``: ``shots`` other rows as ``id, title``, then an id.
    ``next rating``: ``context_rows`` rows of the ratings' file; the next whole row is asked.

    A title that already stands in the rows shown is not asked for: copying would hit it.
    ``control`` deals each film's id another film's row (ids stay ascending, as in the file, so
    that the order of the titles is lost too). In rating rows it adds a constant to every user id
    and another to every film id: ML-1M lists some films of a user in nearly the order of their
    ids, and whoever can count hits some; a constant keeps what can be counted.

    Rows are chosen by a seeded stable hash, ``n`` a task, or all there are.
    """
    dealt = _shuffled(rows.movies, seed, "dealt")
    control = [[row[0], *other[1:]] for row, other in zip(rows.movies, dealt, strict=True)]
    films = dict(zip(CONDITIONS, (rows.movies, control), strict=True))
    ratings = dict(zip(CONDITIONS, (rows.ratings, _moved(rows.ratings, seed)), strict=True))
    return [
        *_next_titles(films, rows.separator, recipe, seed),
        *_titles_of_ids(films, rows.separator, recipe, seed),
        *_next_ratings(ratings, rows.ratings_separator, recipe, seed),
    ]


def _next_titles(films: _Films, sep: str, recipe: ProbeRecipe, seed: int) -> list[Question]:
    shown = recipe.context_rows

    def around(place: int) -> list[int]:
        return list(range(place - shown, place))

    places = _places(range(shown, len(films["source"])), films, around, recipe.n, seed, "next")
    return _title_questions("next title", films, sep, places, around, seed, whole=True)


def _titles_of_ids(films: _Films, sep: str, recipe: ProbeRecipe, seed: int) -> list[Question]:
    size = len(films["source"])

    def around(place: int) -> list[int]:
        drawn: dict[int, None] = {}
        for draw in range(100 * recipe.shots):  # ends in a catalogue smaller than ``shots`` too
            other = _number(seed, "shot", place, draw) % size
            if other != place:
                drawn[other] = None
            if len(drawn) == recipe.shots:
                break
        return list(drawn)

    places = _places(range(size), films, around, recipe.n, seed, "title")
    return _title_questions("title of id", films, sep, places, around, seed, whole=False)


def _places(
    candidates: Sequence[int],
    films: _Films,
    around: Callable[[int], list[int]],
    n: int,
    seed: int,
    what: str,
) -> list[int]:
    """The first ``n`` rows by hash whose title none of the rows around shows, in any condition."""
    chosen: list[int] = []
    for place in sorted(candidates, key=lambda place: _number(seed, what, place)):
        if len(chosen) == n:
            break
        if not any(
            normalise_title(rows[place][_TITLE])
            in {normalise_title(rows[other][_TITLE]) for other in around(place)}
            for rows in films.values()
        ):
            chosen.append(place)
    return chosen


def _title_questions(
    task: str,
    films: _Films,
    sep: str,
    places: Sequence[int],
    around: Callable[[int], list[int]],
    seed: int,
    *,
    whole: bool,
) -> list[Question]:
    # Guessing: any title of the catalogue, each once, whatever the question.
    guesses = [row[_TITLE] for row in _shuffled(films["source"], seed, f"guess {task}")]
    questions = []
    for condition, rows in films.items():
        for place, guess in zip(places, guesses, strict=False):
            lines = [sep.join(rows[o] if whole else rows[o][:2]) for o in around(place)]
            questions.append(
                Question(
                    task=task,
                    condition=condition,
                    prompt="\n".join([*lines, rows[place][0] + sep]),
                    answer=rows[place][_TITLE].strip(),
                    guess=guess.strip(),
                    separator=sep,
                )
            )
    return questions


def _next_ratings(ratings: _Films, sep: str, recipe: ProbeRecipe, seed: int) -> list[Question]:
    shown = recipe.context_rows
    candidates = range(shown, len(ratings["source"]))
    places = sorted(candidates, key=lambda place: _number(seed, "rating", place))[: recipe.n]
    questions = []
    for condition, rows in ratings.items():
        # Guessing: the most frequent film and rating, user and time of the row before.
        movie, rating = (
            Counter(row[column] for row in rows).most_common(1)[0][0]
            for column in (_MOVIE, _RATING)
        )
        for place in places:
            before = rows[place - 1]
            questions.append(
                Question(
                    task="next rating",
                    condition=condition,
                    prompt="\n".join(map(sep.join, rows[place - shown : place])) + "\n",
                    answer=sep.join(rows[place]),
                    guess=sep.join([before[_USER], movie, rating, *before[3:]]),
                    separator=sep,
                )
            )
    return questions


def _moved(ratings: list[_Row], seed: int) -> list[_Row]:
    """The rating rows with a constant added to all user ids, another to all film ids."""
    user, movie = (1 + _number(seed, "moved", column) % _FURTHEST for column in (_USER, _MOVIE))
    return [
        [str(int(row[_USER]) + user), str(int(row[_MOVIE]) + movie), *row[2:]] for row in ratings
    ]


def _shuffled(values: Sequence[_T], seed: int, what: str) -> list[_T]:
    order = sorted(range(len(values)), key=lambda place: _number(seed, what, place))
    return [values[place] for place in order]


def _number(seed: int, *parts: str | int) -> int:
    """64 bits that depend on the arguments alone, on every platform."""
    name = ":".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def matches(question: Question, text: str) -> dict[str, bool]:
    """What of ``text``, a continuation of the prompt, is right, by kind of match.

    Titles: ``exact`` as in the file, ``normalised`` as ``titles`` compares names (the year is not
    asked). Ratings: the whole ``row``, its ``movie_id``, its ``rating``.
    """
    line = text.split("\n", 1)[0].rstrip("\r")
    if question.task in TITLE_TASKS:
        title = line.split(question.separator, 1)[0].strip()
        wanted = normalise_title(question.answer)
        return {
            "exact": title == question.answer,
            "normalised": bool(wanted) and normalise_title(title) == wanted,
        }
    fields, wanted_fields = (
        line.split(question.separator),
        question.answer.split(question.separator),
    )
    return {
        "row": line == question.answer,
        "movie_id": fields[_MOVIE : _MOVIE + 1] == wanted_fields[_MOVIE : _MOVIE + 1],
        "rating": fields[_RATING : _RATING + 1] == wanted_fields[_RATING : _RATING + 1],
    }


def memorisation_table(
    questions: Sequence[Question],
    texts: Sequence[str],
    *,
    confidence: float,
    checkpoint_version: str,
) -> pd.DataFrame:
    """Hits of the model and of the baseline, by task, condition and kind of match.

    Args:
        questions: as ``memorisation_questions`` makes them.
        texts: the model's continuation of each.
        confidence: of the exact intervals (``binomial.clopper_pearson``).

    Returns:
        Columns of ``MEMORISATION``, aggregates only; the baseline stands under ``source``, whose
        rows it guesses.
    """
    found: dict[tuple[str, str, str, str], list[bool]] = {}
    for question, text in zip(questions, texts, strict=True):
        answers = [("model", text)]
        if question.condition == "source":
            answers.append(("baseline", question.guess))
        for answered_by, answer in answers:
            for match, hit in matches(question, answer).items():
                key = (question.task, question.condition, answered_by, match)
                found.setdefault(key, []).append(hit)
    records = []
    for key, hits in found.items():
        low, high = clopper_pearson(sum(hits), len(hits), confidence)
        share = sum(hits) / len(hits)
        records.append((*key, len(hits), sum(hits), share, low, high, checkpoint_version))
    return pd.DataFrame(records, columns=MEMORISATION.names)
