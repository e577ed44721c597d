"""The films of the `sample` dataset: facts only.

What belongs here: reading ``sample_films.csv`` (title, release date, genres, franchise; the n-th
row is movie id n). What does not: how popular or good a film is, which `sample` invents.

The rows were written for this project from general knowledge, not taken from MovieLens. Release
dates are the first of January where only the year matters; films that come out while the
invented users rate carry their release day in the USA. One title stands under two ids, as
several do in MovieLens.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources

#: The flags of u.item, in their order.
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(frozen=True)
class Film:
    """One row of ``sample_films.csv``; ``released`` as u.item writes it ('18-Jul-2008')."""

    title: str
    released: str
    genres: tuple[str, ...]
    franchise: str

    @property
    def release_time(self) -> int:
        """Midnight UTC of the release day, Unix seconds (by hand: strptime reads the locale)."""
        day, month, year = self.released.split("-")
        date = datetime(int(year), _MONTHS.index(month) + 1, int(day), tzinfo=UTC)
        return int(date.timestamp())


def films() -> list[Film]:
    """The catalogue, in id order (ids are 1 … N)."""
    text = (resources.files(__package__) / "sample_films.csv").read_text(encoding="utf-8")
    return [
        Film(row["title"], row["released"], tuple(row["genres"].split("|")), row["franchise"])
        for row in csv.DictReader(text.splitlines())
    ]
