"""New ratings that arrive as files: taken in whole or put aside with the reason.

What belongs here: what a rating file looks like, and merging its rows. What does not: which files
wait (``incoming_files``), what a valid rating is (``movielens``).

The accepted files are the state: a table is always computed from all of them, and a file gets there
by one rename. So a kill at any moment loses nothing, counts nothing twice, and the order of arrival
does not matter. A rating file is taken whole or not at all: half of a wrong file is still wrong.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from filelock import FileLock

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.incoming_files import (
    ACCEPTED,
    QUARANTINE,
    REASON,
    SETTLE_SECONDS,
    accepted_files,
    age_of,
    kept_name,
    printable,
    settled_files,
    waiting_files,
)
from llmrec_assets.ground.movielens import rating_frame, require_known_ratings
from llmrec_assets.ground.store import sha256_file
from llmrec_assets.ground.text_rows import bad_row, numbers_in, read_text

_FIELDS = ("user", "movie", "rating", "timestamp")
_HEADER = {
    **dict.fromkeys(("user_id", "userid"), "user"),
    **dict.fromkeys(("movie_id", "movieid", "item_id", "itemid"), "movie"),
    "rating": "rating",
    "timestamp": "timestamp",
}
_REMEDY = "Correct or remove the row."

Log = Callable[[str], None]


@dataclass(frozen=True)
class TakenIn:
    """What ``take_in`` found.

    ``ratings`` are those of all accepted files (``schemas.RATINGS``); ``accepted`` names these
    files; ``quarantined`` is file → reason of the files put aside now; ``left`` names what was left
    lying: no plain file, still being written, or of a name that is no UTF-8.
    """

    ratings: pd.DataFrame
    accepted: list[str]
    quarantined: dict[str, str]
    left: list[str]


def take_in(
    place: Path, dataset: str, users: pd.DataFrame, movies: pd.DataFrame, log: Log
) -> TakenIn:
    """Accepts or quarantines every waiting file and reads all accepted ones.

    Args:
        place: ``incoming/<data set>``; made when it is not there.
        users, movies: say which ids exist. A file with others is quarantined: a new user needs a
            profile first, and ids of another data set would silently mean other films.

    Raises:
        DataError: an accepted file was changed, or names a user or film that is gone.
    """
    quarantined = {}
    try:
        for directory in (ACCEPTED, QUARANTINE):
            (place / directory).mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock"):
            _remove_reasons_without_a_file(place / QUARANTINE)
            youngest = min((age_of(path) for path in waiting_files(place)), default=SETTLE_SECONDS)
            time.sleep(max(0.0, SETTLE_SECONDS - youngest))
            for path in settled_files(place):
                reason = _accept_or_quarantine(path, dataset, users, movies)
                if reason is None:
                    log(f"{dataset}: accepted {path.name}")
                else:
                    quarantined[path.name] = reason
                    log(f"{dataset}: quarantined {path.name}: {reason}")
            accepted = accepted_files(place)
            frames = [_accepted_ratings(path, dataset, users, movies) for path in accepted]
    except OSError as error:
        raise DataError(
            f"{place} cannot be used for incoming ratings ({error}). Make it readable and "
            "writable, and make room there."
        ) from error
    left = sorted(
        printable(path.name) for path in place.iterdir() if not _ours(path) and path.name[0] != "."
    )
    ratings = merged([pd.concat(frames)] if frames else [])
    return TakenIn(ratings, [path.name for path in accepted], quarantined, left)


def merged(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One rating per user and film of ``RATINGS`` frames, ordered as ``ratings`` is.

    The latest counts, as in MovieLens itself, where a user who rates a film again changes their
    rating and its time. At the same second a later frame counts over an earlier one, and within
    one frame the higher rating: what counts must not depend on the order of rows.
    """
    rows = [frame.assign(_frame=number) for number, frame in enumerate(frames)]
    if not rows:
        return rating_frame([pd.Series([], dtype="int64").to_numpy()] * 4)
    ordered = pd.concat(rows).sort_values(["timestamp", "_frame", "rating"], kind="stable")
    latest = ordered.drop_duplicates(["user_id", "movie_id"], keep="last").drop(columns="_frame")
    return latest.sort_values(["user_id", "timestamp", "movie_id"], ignore_index=True)


def _remove_reasons_without_a_file(quarantine: Path) -> None:
    """Their file was corrected and moved back."""
    for reason in quarantine.glob("*" + REASON):
        if not reason.with_name(reason.name.removesuffix(REASON)).exists():
            reason.unlink()


def _ours(path: Path) -> bool:
    return path.name in (ACCEPTED, QUARANTINE) and path.is_dir()


def _accept_or_quarantine(
    path: Path, dataset: str, users: pd.DataFrame, movies: pd.DataFrame
) -> str | None:
    """Moves the file; returns why it was quarantined, or None."""
    name = kept_name(path)
    try:
        _rating_file(path, dataset, users, movies)
    except PermissionError as error:
        reason = f"{path.name} cannot be read ({error.strerror}). Make it readable."
    except DataError as error:
        reason = str(error)
    else:
        os.replace(path, path.parent / ACCEPTED / name)
        return None
    quarantine = path.parent / QUARANTINE
    text = f"{reason}\nThen move the file back to incoming/{dataset}.\n"
    # First the reason: whoever finds the file finds why.
    (quarantine / (name + REASON)).write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(path, quarantine / name)
    return reason


def _accepted_ratings(
    path: Path, dataset: str, users: pd.DataFrame, movies: pd.DataFrame
) -> pd.DataFrame:
    if path.name.split("-")[0] != sha256_file(path)[:16]:
        raise DataError(
            f"{path} is not what was accepted under this name: it was changed, or put there by "
            f"hand. Restore it, or move it to incoming/{dataset} to have it checked."
        )
    try:
        return _rating_file(path, dataset, users, movies)
    except DataError as error:
        raise DataError(
            f"incoming/{dataset}/{ACCEPTED}: {error} The file was accepted when these existed: "
            f"bring them back, or move the file out of {ACCEPTED}/ to do without its ratings."
        ) from error


def _rating_file(
    path: Path, dataset: str, users: pd.DataFrame, movies: pd.DataFrame
) -> pd.DataFrame:
    """Reads one rating file: a header and commas or tabs, or MovieLens' own formats without one."""
    data = read_text(path, "ratings")
    first, _, rest = data.partition(b"\n")
    line = first.decode("latin-1")
    separator = next((mark for mark in ("::", "\t", ",") if mark in line), None)
    if separator is None:
        raise bad_row(
            "ratings", path.name, 1, "has no comma, tab or :: between its fields", _EXPECTED
        )
    names = [name.strip().strip('"') for name in line.split(separator)]
    fields: Sequence[str] = _FIELDS
    first_row = 1
    if not names[0].isdigit():
        fields, first_row, data = _header(names, path.name), 2, rest
        if not data:
            raise bad_row("ratings", path.name, 2, "is missing: there is only a header", _EXPECTED)
    elif separator == ",":
        what = "holds numbers: a file with commas needs a header that names its columns"
        raise bad_row("ratings", path.name, 1, what, _EXPECTED)
    columns = numbers_in(
        data, path.name, "ratings", separator, fields, first_row=first_row, remedy=_REMEDY
    )
    by_name = dict(zip(fields, columns, strict=True))
    ordered = [by_name[name] for name in _FIELDS]
    require_known_ratings(ordered, dataset, users, movies, path.name, first_row)
    return merged([rating_frame(ordered)])


_EXPECTED = (
    "Write a header user_id,movie_id,rating,timestamp (or item_id), or MovieLens' own rows: "
    "tabs as in u.data, :: as in ratings.dat."
)


def _header(names: Sequence[str], file: str) -> list[str]:
    fields = [_HEADER.get(name.lower(), "") for name in names]
    if sorted(fields) != sorted(_FIELDS):
        what = f"names the columns {', '.join(names)[:80]}, expected each of four once"
        raise bad_row("ratings", file, 1, what, _EXPECTED)
    return fields
