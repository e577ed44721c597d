"""Locks that say who holds them and how long one has waited.

What belongs here: an operating-system file lock with a note of its holder beside it, and telling
the waits in the log and in the UI. What does not: which locks there are (``resources``: the
device; ``results``: an asset's partition).

The lock is the kernel's: it is free as soon as its holder is dead, however it died. The note is for
people: a dead holder's stays until the next one overwrites it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
from filelock import FileLock, Timeout

#: Shows who holds what is waited for, and the seconds waited so far.
Tell = Callable[["Holder | None", float], None]


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: what it is doing, its process, since when (Unix time), and its run."""

    who: str
    pid: int
    since: float
    run_id: str = ""

    def __str__(self) -> str:
        run = f", run {self.run_id[:8]}" if self.run_id else ""
        began = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"{self.who} (process {self.pid}{run}, since {began}, {self.seconds:.0f} s)"

    @property
    def seconds(self) -> float:
        return time.time() - self.since

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """The note at ``path``; None where there is none, or a damaged one."""
        try:
            fact = json.loads(path.read_text())
            run_id = str(fact.get("run_id", ""))
            return cls(str(fact["who"]), int(fact["pid"]), float(fact["since"]), run_id)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, path: Path) -> None:
        fact = {"who": self.who, "pid": self.pid, "since": self.since, "run_id": self.run_id}
        # Made anew under a name that nobody can have planted a link at.
        handle, aside = tempfile.mkstemp(prefix=path.stem, suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(fact))
            os.replace(aside, path)
        except OSError:
            Path(aside).unlink(missing_ok=True)
            raise


def described(holder: Holder | None) -> str:
    """For a sentence: "held by …"."""
    return "a process that has just started or ended" if holder is None else str(holder)


@contextlib.contextmanager
def holding(
    path: Path,
    who: str,
    tell: Tell,
    *,
    run_id: str = "",
    poll_seconds: float = 2.0,
    say_every_seconds: float = 30.0,
) -> Iterator[float]:
    """Holds the lock file ``path``; yields the seconds waited for it.

    Args:
        who: what the holder does, for those who wait.
        tell: called at once when there is a wait, then every ``say_every_seconds``, and after a
            long wait more rarely: after a quarter as long again.
        run_id: the holder's run.
    """
    lock, note = FileLock(path), path.with_suffix(".json")
    waited = _acquire(lock, note, tell, poll_seconds, say_every_seconds)
    try:
        # The note is for people: without one the lock holds all the same.
        with contextlib.suppress(OSError):
            Holder(who, os.getpid(), time.time(), run_id).write(note)
        yield waited
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
        lock.release()


def _acquire(
    lock: FileLock, note: Path, tell: Tell, poll_seconds: float, say_every_seconds: float
) -> float:
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=0)
        return 0.0
    started, next_word = time.monotonic(), 0.0
    while True:
        try:
            lock.acquire(timeout=poll_seconds)
            return time.monotonic() - started
        except Timeout:
            waited = time.monotonic() - started
            if waited >= next_word:
                tell(Holder.read(note), waited)
                next_word = max(waited + say_every_seconds, 1.25 * waited)


def log_waiting(log: Any, what: str) -> Tell:
    """Tells waits for ``what`` in the log."""

    def tell(holder: Holder | None, waited: float) -> None:
        log.info(f"waiting {waited:.0f} s for {what}, held by {described(holder)}")

    return tell


def show_waiting(context: dg.AssetExecutionContext, what: str, asset: str | None = None) -> Tell:
    """Tells waits for ``what`` in the log, and as ``AssetObservation``s with a link to the holder's
    run. ``asset``: of which asset, in a step that makes several."""
    in_log = log_waiting(context.log, what)

    def tell(holder: Holder | None, waited: float) -> None:
        in_log(holder, waited)
        metadata: dict[str, dg.MetadataValue] = {
            "waiting_for": dg.MetadataValue.text(what),
            "held_by": dg.MetadataValue.text(described(holder)),
            "waited_seconds": dg.MetadataValue.int(round(waited)),
        }
        if holder is not None and holder.run_id and context.instance.has_run(holder.run_id):
            metadata["held_by_run"] = dg.MetadataValue.dagster_run(holder.run_id)
        key = context.asset_key if asset is None else dg.AssetKey(asset)
        context.log_event(
            dg.AssetObservation(key, partition=context.partition_key, metadata=metadata)
        )

    return tell
