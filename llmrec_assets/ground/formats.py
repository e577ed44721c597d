"""The two MovieLens formats: which files there are, and what separates their fields.

What belongs here: names. What does not: reading the files (``movielens``), finding them
(``sources``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetFormat:
    """Names and separators of one format's files."""

    name: str
    ratings: str
    movies: str
    users: str
    ratings_separator: str
    separator: str
    """Separates the fields of the movies and users files."""
    optional: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        return (self.ratings, self.movies, self.users)


ML_100K = DatasetFormat(
    "ml-100k", "u.data", "u.item", "u.user", "\t", "|", ("u.genre", "u.occupation")
)
ML_1M = DatasetFormat("ml-1m", "ratings.dat", "movies.dat", "users.dat", "::", "::")

#: Format by data set.
FORMATS: dict[str, DatasetFormat] = {"sample": ML_100K, "ml-100k": ML_100K, "ml-1m": ML_1M}
