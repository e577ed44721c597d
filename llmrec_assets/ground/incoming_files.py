"""Files of new ratings: which wait, which were taken in, and which were put aside and why.

    incoming/<data set>/               put files here
    incoming/<data set>/accepted/      <hash>-<name>: taken in, kept, read again on every run
    incoming/<data set>/quarantine/    <hash>-<name>, and <hash>-<name>.reason.txt beside it

What belongs here: names and places. What does not: ratings (``incoming``), who notices new files
(``orchestration.sensors``).
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from llmrec_assets.ground.store import sha256_file

ACCEPTED = "accepted"
QUARANTINE = "quarantine"
REASON = ".reason.txt"

#: A file that was written to within these seconds may still be growing.
SETTLE_SECONDS = 5.0

_LONGEST_NAME = 200  # bytes; with hash and suffix below the 255 a file system allows


def settled_files(place: Path) -> list[Path]:
    """Plain files that wait in ``place`` and are not being written, by name."""
    return [path for path in waiting_files(place) if age_of(path) >= SETTLE_SECONDS]


def accepted_files(place: Path) -> list[Path]:
    """Files that were taken in, by name."""
    return sorted(path for path in (place / ACCEPTED).glob("[!.]*") if path.is_file())


def quarantined_files(place: Path) -> dict[str, str]:
    """File → reason, of everything that was put aside."""
    directory = place / QUARANTINE
    reasons = {}
    for path in sorted(directory.glob("[!.]*")):
        if not path.name.endswith(REASON):
            reason = directory / (path.name + REASON)
            reasons[path.name] = (
                reason.read_text(encoding="utf-8").strip() if reason.is_file() else "no reason kept"
            )
    return reasons


def fingerprint(names: Sequence[str]) -> str:
    """16 hex digits over the names of accepted files, which carry the hash of their content."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def kept_name(path: Path) -> str:
    """The name a file is kept under: content hash and name, so that the same file dropped again
    is the same file, and another one of that name is another. A file that cannot be read has the
    time of its last write in place of the hash. The mark alone is the name where the whole would be
    too long, or would look like the reason of another file.

    Raises:
        FileNotFoundError: another process has taken it in.
    """
    fits = len(os.fsencode(path.name)) <= _LONGEST_NAME and not path.name.endswith(REASON)
    try:
        mark = sha256_file(path)[:16]
    except PermissionError:
        told = path.stat()
        mark = f"unreadable-{told.st_ino}-{told.st_mtime_ns}"
    return f"{mark}-{path.name}" if fits else mark


def waiting_files(place: Path) -> list[Path]:
    """Plain files in ``place`` that nobody has taken in yet, by name."""
    if not place.is_dir():
        return []
    # A name that starts with a dot is somebody's temporary file. Links are left: what they name
    # could change after it was accepted; a pipe would never end. A name that is no text could
    # stand in no message.
    return sorted(
        path
        for path in place.iterdir()
        if path.name[0] != "."
        and stat.S_ISREG(path.lstat().st_mode)
        and printable(path.name) == path.name
    )


def printable(name: str) -> str:
    """The name with bytes that are no UTF-8 written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def age_of(path: Path) -> float:
    """Seconds since the last write; a time in the future (another machine's clock) counts too."""
    return abs(time.time() - path.stat().st_mtime)
