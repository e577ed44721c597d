"""A disk that refuses, in words: full, read-only or forbidden.

What belongs here: what the error of a failed write means and the way out. What does not: asking
for room before a training (``space``), making room (``retention``).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from llmrec_assets.ground.errors import LlmrecError, StoreError

_GO_ON = (
    "What is published is whole and stays in force; run the same again and it goes on where it "
    "stopped."
)
_FULL = (
    "there is no room left on its disk. Make room (`llmrec prune` lists old versions that may go)"
)
_WRITABLE = "{}. Make it writable"
#: errno → what it means, and what to do.
_TROUBLE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "this process may not write a file that large. Raise `ulimit -f`",
    errno.EROFS: _WRITABLE.format("its file system is mounted read-only"),
    errno.EACCES: _WRITABLE.format("its permissions forbid it"),
    errno.EPERM: _WRITABLE.format("its file system forbids it"),
}
#: What libraries that write files by themselves (DuckDB, safetensors) say instead.
_WORDS = {
    "no space left on device": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "read-only file system": errno.EROFS,
    "permission denied": errno.EACCES,
    "operation not permitted": errno.EPERM,
}
#: And SQLite, in which Dagster keeps its history.
_WORDS_OF_SQLITE = {
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EROFS,
    "unable to open database file": errno.EACCES,
}
#: torch only says that a write failed, SQLite that there was an I/O error: a disk with less room
#: than this, in bytes, is why.
_NO_ROOM = 2**20


def disk_trouble(error: BaseException, home: Path, history: Path | None = None) -> str | None:
    """What a disk that refuses means to whoever runs the graph; None for any other error.

    Args:
        home: what was to be written, where the error names nothing better: ``LLMREC_HOME``, or a
            directory in it.
        history: ``DAGSTER_HOME``, whose databases say no path.
    """
    seen: BaseException | None = error
    known: set[int] = set()
    # Dagster raises a step's error from within the handler of the one it caused: a circle.
    while seen is not None and id(seen) not in known:
        known.add(id(seen))
        told = _told(seen, home, history)
        if told is not None:
            return told
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def _told(error: BaseException, home: Path, history: Path | None) -> str | None:
    text = str(error).lower()
    if isinstance(error, OSError) and error.errno is not None:
        number = error.errno if error.errno in _TROUBLE else None
        named = isinstance(error.filename, (str, bytes, os.PathLike))
        place = Path(os.fsdecode(error.filename)) if named else home
        if number in (errno.EACCES, errno.EPERM) and not (named and place.is_relative_to(home)):
            return None  # perhaps a file to be read, or no file at all: its own words are better
    elif history is not None and (found := _found(_WORDS_OF_SQLITE, text)) is not None:
        return _sentence(history, found, "DAGSTER_HOME")
    elif history is not None and "disk i/o error" in text and _free(history) < _NO_ROOM:
        return _sentence(history, errno.ENOSPC, "DAGSTER_HOME")  # what SQLite says of its log
    else:
        number, place = _found(_WORDS, text), home
        if number in (errno.EACCES, errno.EPERM) and str(home).lower() not in text:
            return None
        if number is None and isinstance(error, RuntimeError) and "writ" in text:
            number = errno.ENOSPC if _free(home) < _NO_ROOM else None
    return None if number is None else _sentence(place, number, "LLMREC_HOME")


def _found(words: dict[str, int], text: str) -> int | None:
    return next((number for said, number in words.items() if said in text), None)


def _sentence(place: Path, number: int, variable: str) -> str:
    elsewhere = "" if number == errno.EFBIG else f", or set {variable} to a directory elsewhere"
    return f"{place} cannot be written: {_TROUBLE[number]}{elsewhere}. {_GO_ON}"


@contextlib.contextmanager
def telling_disk_trouble(home: Path) -> Iterator[None]:
    """Turns the errors of a disk that refuses into ``StoreError``s that name the path and the way
    out; lets all others through.

    Raises:
        StoreError: the disk is full, read-only or forbidden.
    """
    try:
        yield
    except LlmrecError:
        raise
    except Exception as error:
        told = disk_trouble(error, home)
        if told is None:
            raise
        raise StoreError(told) from error


def _free(place: Path) -> int:
    while not place.exists() and place != place.parent:
        place = place.parent
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize
