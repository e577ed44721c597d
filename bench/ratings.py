"""Rating files in ML-1M's format, of any size: what is at hand, and generated rows beyond it.

What belongs here: writing ``users.dat``, ``movies.dat``, ``ratings.dat``. What does not: what is
measured on them (``bench/stages``).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

_FORMAT = "ml-1m"
_ROWS_AT_ONCE = 4_000_000
_START, _YEARS = 956_703_932, 3 * 365 * 86_400  # ML-1M's first second; three years of ratings
_GENRES = ("Action", "Comedy", "Drama", "Horror", "Romance", "Sci-Fi", "Thriller", "War")
_AGES = (1, 18, 25, 35, 45, 50, 56)


def part_at_hand() -> Path | None:
    """The directory of ML-1M, whole or in part; ``None`` where there is none."""
    project = Path(__file__).resolve().parents[1]
    named = os.environ.get("LLMREC_DATA_DIR")
    for place in [*([Path(named)] if named else []), project.parent / "shared" / "data"]:
        if (place / _FORMAT / "ratings.dat").is_file():
            return place / _FORMAT
    return None


def ml_1m_sized(directory: Path, n_rows: int, n_users: int, seed: int) -> str:
    """Exactly ``n_rows`` ratings of the users 1 to ``n_users``; returns what they are made of.

    The rows at hand stand first, unchanged; the users they leave without a rating get generated
    ones. Without data at hand everything is generated.
    """
    part = part_at_hand()
    if part is None:
        generated(directory, n_rows, n_users, 3_883, seed)
        return f"{n_rows:,} generated rows"
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(part / "movies.dat", directory / "movies.dat")
    lines = (part / "ratings.dat").read_bytes().splitlines(keepends=True)[:n_rows]
    last = int(lines[-1].split(b"::")[0])
    users = (part / "users.dat").read_bytes().splitlines(keepends=True)
    (directory / "users.dat").write_bytes(b"".join(users[: max(n_users, last)]))
    movie_ids = np.array(
        [int(row.split(b"::")[0]) for row in (part / "movies.dat").read_bytes().splitlines()]
    )
    with (directory / "ratings.dat").open("wb") as file:
        file.writelines(lines)
        if len(lines) < n_rows:
            _write(file, *_rows(n_rows - len(lines), last + 1, n_users, movie_ids, seed))
    return f"{len(lines):,} rows of ML-1M and {n_rows - len(lines):,} generated ones"


def generated(directory: Path, n_rows: int, n_users: int, n_movies: int, seed: int) -> None:
    """Invented users, films and ratings; nothing of MovieLens."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with (directory / "users.dat").open("w", encoding="latin-1") as file:
        for user in range(1, n_users + 1):
            age, job, zipped = rng.choice(_AGES), rng.integers(21), rng.integers(10_000, 99_999)
            file.write(f"{user}::{'MF'[user % 2]}::{age}::{job}::{zipped}\n")
    with (directory / "movies.dat").open("w", encoding="latin-1") as file:
        for movie in range(1, n_movies + 1):
            genres = "|".join(sorted(rng.choice(_GENRES, size=2, replace=False)))
            file.write(f"{movie}::Invented Film {movie} ({1950 + movie % 50})::{genres}\n")
    with (directory / "ratings.dat").open("wb") as file:
        _write(file, *_rows(n_rows, 1, n_users, np.arange(1, n_movies + 1), seed))


def _rows(
    n_rows: int, first_user: int, last_user: int, movie_ids: np.ndarray, seed: int
) -> tuple[np.ndarray, ...]:
    """user, movie, rating, timestamp, by user; a film is rated once by a user.

    Histories are long-tailed (log-normal), popularity falls as one over the square root of a film's
    rank, and a user rates in few sittings, so that most ratings share their second with another,
    as in MovieLens.
    """
    rng = np.random.default_rng(seed)
    n_users = last_user - first_user + 1
    share = rng.lognormal(4.5, 1.0, n_users)
    n_movies = len(movie_ids)
    most = n_movies // 2
    counts = np.clip((share / share.sum() * n_rows).astype(np.int64), 20, most)
    while counts.sum() != n_rows:  # rounding and the bounds, shared out
        gap = n_rows - counts.sum()
        free = np.flatnonzero(counts < most) if gap > 0 else np.flatnonzero(counts > 20)
        some = rng.choice(free, size=min(abs(gap), len(free)), replace=False)
        counts[some] += 1 if gap > 0 else -1
    user = np.repeat(np.arange(n_users), counts)
    nth = np.arange(n_rows) - np.repeat(np.cumsum(counts) - counts, counts)
    # one film from each of a user's equal shares of all popularity; one that is drawn again gives
    # way to the next less popular, and at the end of the catalogue to the one before
    edges = np.cumsum(1 / np.sqrt(np.arange(n_movies) + 1))
    rank = np.searchsorted(edges, (nth + rng.random(n_rows)) / counts[user] * edges[-1])
    apart = 4 * n_movies * user  # keeps the running maximum within a user
    rank = np.maximum.accumulate(rank - nth + apart) - apart + nth
    rank = np.minimum(rank, n_movies - counts[user] + nth)
    film = rng.permutation(n_movies)[rank]
    del rank, apart, nth
    stars = rng.choice(np.array([1, 2, 3, 4, 5]), p=[0.06, 0.11, 0.26, 0.35, 0.22], size=n_rows)
    begun = _START + rng.integers(0, _YEARS, n_users)
    second = rng.integers(0, 1 + counts[user] // 2) * 17
    return user + first_user, movie_ids[film], stars, begun[user] + second


def _write(file, *columns: np.ndarray) -> None:
    for start in range(0, len(columns[0]), _ROWS_AT_ONCE):
        some = [column[start : start + _ROWS_AT_ONCE] for column in columns]
        sink = pa.BufferOutputStream()
        csv.write_csv(
            pa.table(some, names=["u", "m", "r", "t"]),
            sink,
            csv.WriteOptions(include_header=False, delimiter="\t"),
        )
        file.write(sink.getvalue().to_pybytes().replace(b"\t", b"::"))
