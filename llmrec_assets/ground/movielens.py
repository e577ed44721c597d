"""Reads the two MovieLens formats: files in, frames with the declared columns out.

What belongs here: what stands in the files of ML-100K and ML-1M, their codes, and saying exactly
which row of which file cannot be used. What does not: where the files come from (``sources``),
how text becomes fields (``text_rows``), where a ZIP code lies (``places``), what the tables'
columns mean (``schemas``).

Formats: the README of each data set; F. M. Harper and J. A. Konstan, "The MovieLens Datasets:
History and Context", ACM TiiS 5(4), 2015.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from llmrec_assets.ground.formats import FORMATS, ML_100K, DatasetFormat
from llmrec_assets.ground.ordering import by_user_and_time, occurred_before
from llmrec_assets.ground.places import city_state
from llmrec_assets.ground.text_rows import RESTORE, bad_row, number_columns, rows, whole_number

#: ML-100K's genre flags in column order, for when ``u.genre`` is not there.
GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
]  # fmt: skip

#: ML-1M's age codes.
AGE_BANDS = {
    1: "under 18",
    18: "18-24",
    25: "25-34",
    35: "35-44",
    45: "45-49",
    50: "50-55",
    56: "56+",
}

#: ML-1M's occupation codes are the positions in this list.
OCCUPATIONS = [
    "other or not specified", "academic/educator", "artist", "clerical/admin",
    "college/grad student", "customer service", "doctor/health care", "executive/managerial",
    "farmer", "homemaker", "K-12 student", "lawyer", "programmer", "retired", "sales/marketing",
    "scientist", "self-employed", "technician/engineer", "tradesman/craftsman", "unemployed",
    "writer",
]  # fmt: skip

# ``strptime`` would read month names in the machine's language.
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
_DATE = re.compile(r"([0-9]{1,2})-([A-Za-z]{3})-([0-9]{4})")
_YEAR = re.compile(r"\(([0-9]{4})\)")

_LARGEST_ID = 2**31 - 1
_TIMESTAMPS = (1, 4_102_444_800)  # up to 2100-01-01; milliseconds fall outside, and so does 0
_RATING_FIELDS = ("user", "item", "rating", "timestamp")


def read_ratings(
    directory: Path, dataset: str, users: pd.DataFrame, movies: pd.DataFrame
) -> pd.DataFrame:
    """Reads the ratings: columns of ``schemas.RATINGS``, by user_id, timestamp, movie_id.

    ``users`` and ``movies`` say which ids exist. Raises DataError naming the first row that
    cannot be used.
    """
    form = _format(dataset)
    file = form.ratings
    columns = number_columns(directory / file, "ratings", form.ratings_separator, _RATING_FIELDS)
    require_known_ratings(columns, dataset, users, movies, file)
    user, movie, rating, timestamp = columns
    again = occurred_before(user, movie)
    if again.any():
        second = int(again.argmax())
        first = int(((user == user[second]) & (movie == movie[second])).argmax())
        raise bad_row(
            "ratings",
            file,
            second + 1,
            f"repeats user {user[second]} and movie {movie[second]} of row {first + 1:,}",
            "Keep one of the two rows: a user rates a movie once.",
        )
    user, timestamp, movie, rating = by_user_and_time(user, timestamp, movie, rating)
    return rating_frame([user, movie, rating, timestamp])


def require_known_ratings(
    columns: Sequence[np.ndarray],
    dataset: str,
    users: pd.DataFrame,
    movies: pd.DataFrame,
    file: str,
    first_row: int = 1,
) -> None:
    """Refuses ratings that are no stars, no times, or of users or films that do not exist.

    Args:
        columns: user, movie, rating, timestamp; element i is row ``first_row`` + i of ``file``.
        users, movies: say which ids exist.

    Raises:
        DataError: names the first such row and their number.
    """
    user, movie, rating, timestamp = columns
    form = _format(dataset)

    def refuse(bad: np.ndarray, column: np.ndarray, what: str, remedy: str = RESTORE) -> None:
        if bad.any():
            row = int(bad.argmax())
            count = int(bad.sum())
            others = f" ({count:,} such rows)" if count > 1 else ""
            shown = what.format(column[row]) + others
            raise bad_row("ratings", file, row + first_row, shown, remedy)

    refuse((rating < 1) | (rating > 5), rating, "has rating {}, expected 1 to 5")
    low, high = _TIMESTAMPS
    refuse(
        (timestamp < low) | (timestamp >= high),
        timestamp,
        "has timestamp {}, expected Unix seconds between 1970 and 2100",
        "Write timestamps in seconds (not milliseconds) since 1970-01-01 UTC.",
    )
    for name, column, known, source in (
        ("user", user, users["user_id"], form.users),
        ("movie", movie, movies["movie_id"], form.movies),
    ):
        refuse(
            ~np.isin(column, known.to_numpy(dtype=np.int64)),
            column,
            f"names {name} {{}}, which {source} does not have",
            f"Add the {name} to {source}, remove the row, or use files of one and the same "
            "data set.",
        )


def rating_frame(columns: Sequence[np.ndarray]) -> pd.DataFrame:
    """Checked user, movie, rating and timestamp as ``schemas.RATINGS`` has them."""
    user, movie, rating, timestamp = columns
    return pd.DataFrame(
        {
            "user_id": user.astype(np.int32),
            "movie_id": movie.astype(np.int32),
            "rating": rating.astype(np.int8),
            "timestamp": timestamp.astype(np.int64),
        }
    )


def read_movies(directory: Path, dataset: str) -> pd.DataFrame:
    """Reads the films: columns of ``schemas.MOVIES``, in file order.

    A title under two ids counts as one film: ``canonical_movie_id`` is the smallest of its ids.
    """
    form = _format(dataset)
    file = form.movies
    if form is ML_100K:
        names = _genre_names(directory)
        fields = ("id", "title", "release date", "video date", "URL", *names)
        shown = f"id, title, release date, video date, URL and {len(names)} genre flags"
    else:
        fields = ("id", "title", "genres")
        shown = ", ".join(fields)
    ids, titles, dates, genres = _Ids("movies", file), [], [], []
    for row, values in rows(directory / file, "movies", form.separator, len(fields), shown):
        ids.add(row, values[0])
        titles.append(values[1].strip())
        if not titles[-1]:
            raise bad_row("movies", file, row, "has no title")
        if form is ML_100K:
            dates.append(_date(values[2].strip(), file, row))
            flags = [flag.strip() for flag in values[5:]]
            if not set(flags) <= {"0", "1"}:
                strange = next(flag for flag in flags if flag not in {"0", "1"})
                raise bad_row("movies", file, row, f"has genre flag {strange!r}, expected 0 or 1")
            genres.append([name for name, flag in zip(names, flags, strict=True) if flag == "1"])
        else:
            dates.append(None)
            genres.append([name.strip() for name in values[2].split("|") if name.strip()])
    years = [int(found[-1]) if (found := _YEAR.findall(title)) else None for title in titles]
    movies = pd.DataFrame(
        {
            "movie_id": np.array(ids.values, dtype=np.int32),
            "title": pd.Series(titles, dtype="string"),
            "year": pd.array(years, dtype="Int16"),
            "release_date": pd.Series(dates, dtype=object),
            "genres": pd.Series(genres, dtype=object),
        }
    )
    movies["canonical_movie_id"] = movies.groupby("title")["movie_id"].transform("min")
    return movies


def read_users(directory: Path, dataset: str) -> pd.DataFrame:
    """Reads the users: columns of ``schemas.USERS``, in file order.

    ML-100K has an age in years, ML-1M an age band and an occupation code; ZIP codes stay strings.
    """
    form = _format(dataset)
    file = form.users
    if form is ML_100K:
        order = ("user", "age", "gender", "occupation", "zip code")
    else:
        order = ("user", "gender", "age", "occupation", "zip code")
    ids, ages, bands = _Ids("users", file), [], []
    genders, occupations, zips = [], [], []
    for row, values in rows(
        directory / file, "users", form.separator, len(order), ", ".join(order)
    ):
        value = dict(zip(order, (text.strip() for text in values), strict=True))
        ids.add(row, value["user"])
        age = whole_number("users", file, row, "age", value["age"])
        if value["gender"] not in {"M", "F"}:
            raise bad_row("users", file, row, f"has gender {value['gender']!r}, expected M or F")
        if form is ML_100K:
            if not 1 <= age <= 120:
                raise bad_row("users", file, row, f"has age {age}, expected 1 to 120 years")
            if not value["occupation"]:
                raise bad_row("users", file, row, "has no occupation")
        else:
            code = whole_number("users", file, row, "occupation", value["occupation"])
            if age not in AGE_BANDS:
                codes = ", ".join(map(str, AGE_BANDS))
                raise bad_row("users", file, row, f"has age code {age}, expected one of {codes}")
            if not 0 <= code < len(OCCUPATIONS):
                raise bad_row("users", file, row, f"has occupation code {code}, expected 0 to 20")
        ages.append(age if form is ML_100K else None)
        bands.append(None if form is ML_100K else AGE_BANDS[age])
        genders.append(value["gender"])
        occupations.append(value["occupation"] if form is ML_100K else OCCUPATIONS[code])
        zips.append(value["zip code"])
    place_of = city_state(zips)
    places = [place_of[code] or (None, None) for code in zips]
    return pd.DataFrame(
        {
            "user_id": np.array(ids.values, dtype=np.int32),
            "age": pd.array(ages, dtype="Int16"),
            "age_band": pd.Series(bands, dtype="string"),
            "gender": pd.Series(genders, dtype="string"),
            "occupation": pd.Series(occupations, dtype="string"),
            "zip_code": pd.Series(zips, dtype="string"),
            "city": pd.Series([city for city, _ in places], dtype="string"),
            "state": pd.Series([state for _, state in places], dtype="string"),
        }
    )


class _Ids:
    """Ids of a table in file order, each once."""

    def __init__(self, table: str, file: str) -> None:
        self._table, self._file = table, file
        self._rows: dict[int, int] = {}

    @property
    def values(self) -> list[int]:
        return list(self._rows)

    def add(self, row: int, text: str) -> None:
        number = whole_number(self._table, self._file, row, "id", text)
        if not 1 <= number <= _LARGEST_ID:
            what = f"has id {number}, expected 1 to {_LARGEST_ID}"
            raise bad_row(self._table, self._file, row, what)
        if number in self._rows:
            what = f"repeats id {number} of row {self._rows[number]:,}"
            remedy = "Keep one of the two rows, or give one another id."
            raise bad_row(self._table, self._file, row, what, remedy)
        self._rows[number] = row


def _format(dataset: str) -> DatasetFormat:
    if dataset not in FORMATS:
        raise ValueError(f"unknown data set {dataset!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[dataset]


def _date(text: str, file: str, row: int) -> dt.date | None:
    if not text:
        return None
    try:
        day, month, year = _DATE.fullmatch(text).groups()  # type: ignore[union-attr]
        return dt.date(int(year), _MONTHS.index(month.capitalize()) + 1, int(day))
    except (AttributeError, ValueError) as error:
        what = f"has release date {text[:40]!r}, expected a date like 01-Jan-1995 or nothing"
        raise bad_row("movies", file, row, what) from error


def _genre_names(directory: Path) -> Sequence[str]:
    if not (directory / "u.genre").is_file():
        return GENRES
    names = []
    for row, (name, index) in rows(directory / "u.genre", "genres", "|", 2, "genre, position"):
        if index.strip() != str(row - 1):
            what = f"has position {index[:40]!r}, expected {row - 1}: flags are read in this order"
            raise bad_row("genres", "u.genre", row, what)
        names.append(name.strip())
    return names


def require_readable(directory: Path, dataset: str) -> None:
    """Reads all three tables and drops them: files with an error are refused as a whole, so that
    new films never stand beside old ratings.

    Raises:
        DataError: as the readers raise it.
    """
    users, movies = read_users(directory, dataset), read_movies(directory, dataset)
    read_ratings(directory, dataset, users, movies)
