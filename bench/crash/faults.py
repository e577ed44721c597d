"""A disk that fills up or becomes read-only in the middle of a run, and two runs at once.

What belongs here: the experiments that are not kills. What does not: kills (``matrix``), how a file
operation is met (``attempt``). Needs to be root, for a file system of its own (tmpfs).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import look
from attempt import Place, load_modules, start_warm
from matrix import Journal, wait_for

_ROOM = 64 * 2**20


@contextmanager
def file_system(directory: Path) -> Iterator[Path]:
    """A small file system of its own.

    Raises:
        PermissionError: this user may not mount.
    """
    directory.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_ROOM}", "tmpfs", str(directory)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        raise PermissionError(f"no file system of its own for this: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory: Path) -> None:
    """Takes the last byte."""
    descriptor = os.open(directory / "filler", os.O_WRONLY | os.O_CREAT, 0o600)
    for size in (2**20, 4096, 1):
        try:
            while True:
                os.write(descriptor, b"\0" * size)
        except OSError:
            continue
    os.close(descriptor)


def make_room(directory: Path) -> None:
    (directory / "filler").unlink(missing_ok=True)


def forbid(directory: Path) -> None:
    """No directory may be written any more; open files are not affected."""
    for path, _, _ in os.walk(directory):
        os.chmod(path, 0o555)


def allow(directory: Path) -> None:
    for path, _, _ in os.walk(directory):
        os.chmod(path, 0o755)


#: What is being written → the first operation of it that the run does: a part of its description.
WRITTEN: Sequence[tuple[str, str, str]] = (
    ("a table", "ratings", "open tables/ratings/"),
    ("a table's pointer", "movies", "open tables/movies/sample/.current.json"),
    ("the views", "prompts", "open .warehouse.lock"),
    ("a training state", "sft_checkpoint", "mkdir work/sft_checkpoint/sample/crash/*/checkpoint-2"),
    ("a checkpoint's manifest", "sft_checkpoint", ".manifest.json"),
    ("a checkpoint's pointer", "sft_checkpoint", "open checkpoints/sft_checkpoint/"),
    ("a batch of samples", "sampled_responses", "open work/sampled_responses/"),
    ("PPO's state", "rlhf_checkpoint", "mkdir work/rlhf_checkpoint/sample/crash/*/unfinished"),
    ("the report", "report", "open work/report/"),
)


@dataclass(frozen=True)
class Fault:
    """``of_home``: ``LLMREC_HOME`` lies on the disk that refuses, else ``DAGSTER_HOME`` does."""

    name: str
    begin: Callable[[Path], None]
    end: Callable[[Path], None]
    of_home: bool = True
    while_writing: Collection[str] = tuple(what for what, _, _ in WRITTEN)


FAULTS = (
    Fault("full", fill, make_room),
    Fault("read-only", forbid, allow),
    Fault(
        "full, with Dagster's history",
        fill,
        make_room,
        of_home=False,
        while_writing=("a table", "a training state"),
    ),
)
_THE_END = "the end"


def run_faults(out: Path, say: Callable[[str], None]) -> None:
    """Each fault in turn within one run per kind of fault, and two runs at once; what was seen
    stands in ``faults.jsonl``.

    Raises:
        RuntimeError: there is no undisturbed run to compare with: ``matrix`` makes one.
    """
    entries = Journal(out / "journal.jsonl").read()
    reference = next((e for e in entries if e["kind"] == "undisturbed"), None)
    if reference is None:
        raise RuntimeError("run `matrix` first (`--runs 0` for the undisturbed run alone)")
    load_modules(reference["modules"])
    expected = look.Found(**reference["found"])
    operations = [(step, what) for _, step, what in reference["operations"]]
    journal = Journal(out / "faults.jsonl")
    done = {(e["fault"], e["what"]) for e in journal.read()}
    for fault in FAULTS:
        if (fault.name, _THE_END) in done:
            continue
        with file_system(out / "file-system") as directory:
            place = Place(
                out / fault.name.replace(" ", "-"),
                out / "sample",
                home_elsewhere=directory / "home" if fault.of_home else None,
                history_elsewhere=None if fault.of_home else directory / "dagster",
            )
            shutil.rmtree(place.root, ignore_errors=True)
            place.root.mkdir(parents=True)
            before: dict[str, list[str]] = {}
            for what, step, part in WRITTEN:
                if what not in fault.while_writing:
                    continue
                at = next((s, o) for s, o in operations if s == step and part in o)
                seen = _one(place, directory, at, fault, before, expected)
                before = seen.pop("published")
                journal.write(fault=fault.name, what=what, step=step, **seen)
                say(f"{fault.name}, {what}: {seen}")
            status, said = _command(place, None, None)
            lost = look.unequal(look.found_at(place), expected) + look.unwell_at(place)
            journal.write(fault=fault.name, what=_THE_END, status=status, said=said, lost=lost)
            say(f"{fault.name}: ended with {status}, lost {lost or 0}")
    for what in ("an empty home", "a filled home"):
        if ("two at once", what) not in done:
            seen = _two_at_once(out, what == "an empty home", expected)
            journal.write(fault="two at once", what=what, **seen)
            say(f"two at once, {what}: {seen}")


def _command(
    place: Place, at: tuple[str, str] | None, do: Callable[[], None] | None
) -> tuple[int, str]:
    """Exit status and the last line said."""
    pid = start_warm(place, at=at, do=do, bound=True)
    status = wait_for(pid, float("inf"))
    assert status is not None
    last = place.output.read_text(errors="replace").strip().split("\n")[-1]
    # Dagster's logger leaves its own last line without an end.
    return status, last[max(last.rfind("llmrec: "), 0) :]


def _one(
    place: Place,
    directory: Path,
    at: tuple[str, str],
    fault: Fault,
    before: dict[str, list[str]],
    expected: look.Found,
) -> dict[str, Any]:
    """The command meets the fault at that operation, and ends; then the fault is ended."""
    since = place.output.stat().st_size if place.output.exists() else 0
    status, said = _command(place, at, lambda: fault.begin(directory))
    fault.end(directory)
    found = look.found_at(place)
    traceback = b"Traceback" in place.output.read_bytes()[since:]
    return {
        "at": " ".join(at),
        "status": status,
        "said": said.replace(str(directory), "…"),
        "told": status == 1 and said.startswith("llmrec: ") and "cannot be written" in said,
        "traceback": traceback,
        "states": look.saved_states(place.home),
        "lost": look.lost(before, found, expected),
        "published": found.published,
    }


def _two_at_once(out: Path, empty: bool, expected: look.Found) -> dict[str, Any]:
    """Both started together, on one home: both end well, and each training happens once."""
    place = Place(out / "two", out / "sample")
    if empty:
        shutil.rmtree(place.root, ignore_errors=True)
        place.root.mkdir(parents=True)
    place.output.unlink(missing_ok=True)
    pids = [start_warm(place) for _ in range(2)]
    statuses = [wait_for(pid, float("inf")) for pid in pids]
    found = look.found_at(place)
    text = place.output.read_text(errors="replace")
    trained = {
        asset: text.count(f"published {asset} version")
        for asset in ("sft_checkpoint", "dpo_checkpoint", "reward_model", "rlhf_checkpoint")
    }
    lost = look.unequal(found, expected) + look.unwell_at(place)
    return {"statuses": statuses, "trainings": trained, "lost": lost}
