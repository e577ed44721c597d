"""Carries the kills out, run after run, and keeps a journal by which it goes on after its own end.

What belongs here: starting, killing, starting again, the journal. What does not: when to kill
(``plan``), what is looked at (``look``), the page (``run``).
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import look
import plan
from attempt import PROJECT, Place, load_modules, start_cold, start_warm

TIMEOUT_S = 1200
_POLL_S = 0.004


@dataclass
class Trace:
    """What the trace of one attempt says so far."""

    began: dict[str, tuple[float, int]] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    files: list[tuple[float, str, str]] = field(default_factory=list)
    killed: str | None = None
    done: bool = False

    @property
    def going_on(self) -> dict[str, int]:
        """Step → process, of steps that have begun and not ended."""
        return {step: pid for step, (_, pid) in self.began.items() if step not in self.ended}


def read_trace(path: Path) -> Trace:
    """Reads whole lines."""
    trace = Trace()
    with suppress(FileNotFoundError):
        for line in path.read_text().split("\n")[:-1]:
            moment, pid, what, *rest = line.split(" ", 3)
            if what == "STEP_START":
                trace.began[rest[0]] = float(moment), int(pid)
                trace.ended.pop(rest[0], None)
            elif what in ("STEP_SUCCESS", "STEP_FAILURE"):
                trace.ended[rest[0]] = float(moment)
            elif what == "FILE":
                step, operation = rest[0].split(" ", 1)
                trace.files.append((float(moment), step, operation))
            elif what == "KILLED":
                trace.killed = rest[0].split(" ", 1)[1]
            elif what == "END":
                trace.done = True
    return trace


# -- one attempt --------------------------------------------------------------------------------


@dataclass
class Outcome:
    """``hit``: who was killed, None where the attempt had ended before. ``status``: its exit
    status, negative for a signal. ``before``: the file operation. ``orphans``: steps of a killed
    worker."""

    hit: plan.Target | None
    status: int
    seconds: float
    during: list[str]
    before: str | None
    orphans: list[int]
    pace: float


def wait_for(pid: int, until: float) -> int | None:
    """The exit status (negative for a signal), or None where it still runs at ``until``."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(_POLL_S)


def carry_out(kill: plan.Kill, place: Place, steps: bool, pace: float) -> Outcome:
    """Starts the command, kills as planned, and waits until what was started is gone (but for
    orphans of a killed run worker).

    Args:
        pace: how many times longer than undisturbed the last attempt took to where it came.
    """
    place.trace.unlink(missing_ok=True)
    started = time.monotonic()
    deadline = started + TIMEOUT_S
    if kill.how == "start-up":
        pid = start_cold(place) if kill.cold else start_warm(place, steps=steps)
        status = wait_for(pid, started + kill.seconds * pace)
    else:
        at = (kill.step, kill.operation) if kill.how == "file" else None
        pid = start_warm(place, steps=steps, at=at)
        status = None
        if kill.how == "time":
            while status is None and kill.step not in read_trace(place.trace).began:
                status = wait_for(pid, min(deadline, time.monotonic() + 0.02))
                if time.monotonic() > deadline:
                    break
            if status is None:
                pace = (time.monotonic() - started) / kill.begins
                status = wait_for(pid, time.monotonic() + kill.seconds * pace)
        else:
            status = wait_for(pid, deadline)
    trace = read_trace(place.trace)
    seconds = time.monotonic() - started
    during = sorted(trace.going_on)
    if kill.how == "file":
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            wait_for(pid, deadline + 60)
            raise TimeoutError(f"{kill}: the attempt did not end within {TIMEOUT_S} s")
        met = kill.target if trace.killed is not None else None
        return Outcome(met, status, seconds, during, trace.killed, [], pace)
    if status is not None:
        return Outcome(None, status, seconds, during, None, [], pace)
    orphans: list[int] = []
    hit = kill.target
    if kill.target == "step" and trace.going_on:
        victim = random.Random(f"{kill}").choice(sorted(trace.going_on.values()))
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        status = wait_for(pid, deadline)
        if status is None:
            raise TimeoutError(f"{kill}: the worker goes on without its step")
    elif kill.target == "group":
        os.killpg(pid, signal.SIGKILL)
        status = wait_for(pid, deadline)
    else:
        hit = "worker" if steps else "command"  # also where no step was going on to be killed
        os.kill(pid, signal.SIGKILL)
        status = wait_for(pid, deadline)
        orphans = sorted(p for p in trace.going_on.values() if p != pid)
    assert status is not None
    return Outcome(hit, status, seconds, during, None, orphans, pace)


def finish(place: Place, steps: bool) -> tuple[int, float]:
    """The same command once more, undisturbed: exit status and seconds."""
    place.trace.unlink(missing_ok=True)
    started = time.monotonic()
    pid = start_warm(place, steps=steps)
    status = wait_for(pid, started + TIMEOUT_S)
    if status is None:
        os.killpg(pid, signal.SIGKILL)
        wait_for(pid, started + TIMEOUT_S + 60)
        raise TimeoutError(f"{place.root}: the command did not end within {TIMEOUT_S} s")
    return status, time.monotonic() - started


# -- the undisturbed run ------------------------------------------------------------------------


def small_sample(directory: Path, users: int = 60) -> Path:
    """The committed sample's first users."""
    source = PROJECT / "data" / "sample"
    directory.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        rows = path.read_bytes().splitlines(keepends=True)
        if path.name in ("u.data", "u.user"):
            rows = [row for row in rows if int(re.split(rb"[\t|]", row)[0]) <= users]
        (directory / path.name).write_bytes(b"".join(rows))
    return directory


def undisturbed(out: Path, sample: Path, loading_s: float) -> dict[str, Any]:
    """Runs once without a kill: what kills are planned by, and what every other run is compared
    with."""
    place = Place(out / "undisturbed", sample)
    ended = place.root / "ended.json"
    if not ended.exists():
        shutil.rmtree(place.root, ignore_errors=True)
        place.root.mkdir(parents=True)
        began = time.monotonic()
        status = wait_for(start_warm(place, every_file=True), began + TIMEOUT_S)
        if status != 0:
            raise RuntimeError(f"the undisturbed run failed: see {place.output}")
        ended.write_text(json.dumps({"began": began, "seconds": time.monotonic() - began}))
    fact = json.loads(ended.read_text())
    began, trace = fact["began"], read_trace(place.trace)
    steps = [
        (step, start - began, trace.ended[step] - began) for step, (start, _) in trace.began.items()
    ]
    return {
        "steps": steps,
        "operations": [(moment - began, *what) for moment, *what in trace.files],
        # A cold start loads what this process has loaded, and then does what a warm one does.
        "start_up": loading_s + steps[0][1],
        "modules": json.loads(place.modules.read_text()),
        "seconds": fact["seconds"],
        "found": look.found_at(place).to_json(),
        "unwell": look.unwell_at(place),
    }


# -- the journal --------------------------------------------------------------------------------


class Journal:
    """One JSON object a line, on the disk before the next thing is done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Whole lines: a kill of this bench may have torn the last one."""
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        return [json.loads(line) for line in lines]

    def write(self, **fact: Any) -> None:
        fact["cpu"] = round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), 1)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(fact).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def reused_in(output: Path, since: int) -> list[str]:
    """Assets that an attempt took as published, from its log."""
    if not output.exists():
        return []
    text = output.read_bytes()[since:].decode(errors="replace")
    return sorted(set(re.findall(r"(\w+) version \S+ is already published, intact", text)))


def run_matrix(
    out: Path,
    *,
    runs: int,
    runs_with_steps: int,
    runs_in_trainings: int,
    kills: int,
    seed: int,
    loading_s: float,
    say: Callable[[str], None],
) -> None:
    """The whole matrix, or what is left of it.

    Args:
        runs_in_trainings: that many of the runs, the last ones, are killed in trainings alone.
        runs_with_steps: that many before them have a process per step.
        kills: of each run.
        loading_s: what loading the libraries took this process.

    Raises:
        TimeoutError, RuntimeError: an attempt hung, or the undisturbed run failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "journal.jsonl")
    sample = small_sample(out / "sample")
    entries = journal.read()
    reference = next((e for e in entries if e["kind"] == "undisturbed"), None)
    if reference is None:
        started = time.time()
        fact = undisturbed(out, sample, loading_s)
        journal.write(kind="undisturbed", started=started, seed=seed, **fact)
        reference = {"started": started, "seed": seed, **fact}
        say(f"undisturbed: {fact['seconds']:.0f} s")
    load_modules(reference["modules"])
    expected = look.Found(**reference["found"])
    timeline = plan.from_json(reference)
    pace = 1.0
    for run in range(1, runs + 1):
        mine = [e for e in entries if e.get("run") == run]
        if any(e["kind"] == "end" for e in mine):
            continue
        in_trainings = run > runs - runs_in_trainings
        steps = not in_trainings and run > runs - runs_in_trainings - runs_with_steps
        place = Place(out / f"run-{run:02d}", sample)
        place.root.mkdir(parents=True, exist_ok=True)
        done = {e["number"] for e in mine if e["kind"] == "kill"}
        before: dict[str, list[str]] = max(
            (e for e in mine if e["kind"] == "kill"),
            key=lambda e: e["number"],
            default={"published": {}},
        )["published"]
        planned = (
            plan.kills_in_trainings(run, kills, timeline, seed=seed)
            if in_trainings
            else plan.kills_of_run(run, kills, timeline, seed=seed, steps=steps)
        )
        for kill in planned:
            if kill.number in done:
                continue
            since = place.output.stat().st_size if place.output.exists() else 0
            outcome = carry_out(kill, place, steps, pace)
            pace = outcome.pace
            found, problems = _looked_at(place, before, expected, outcome.orphans)
            failed = _unexpected(outcome)
            journal.write(
                kind="kill",
                time=time.time(),
                **kill.to_json(),
                with_steps=steps,
                hit=outcome.hit,
                status=outcome.status,
                after=round(outcome.seconds, 1),
                during=outcome.during,
                before=outcome.before,
                orphans=len(outcome.orphans),
                states=look.saved_states(place.home),
                reused=reused_in(place.output, since),
                published=found.published,
                lost=problems,
                failed=failed,
            )
            before = found.published
            say(
                f"run {run} kill {kill.number + 1}: {kill.how} {outcome.hit} after "
                f"{outcome.seconds:.0f} s in {', '.join(outcome.during) or 'no step'}"
                + (f", before {outcome.before}" if outcome.before else "")
                + ("" if outcome.hit else f" (had ended with {outcome.status})")
                + (f"; LOST {problems}" if problems else "")
                + (f"; FAILED {failed}" if failed else "")
            )
        since = place.output.stat().st_size if place.output.exists() else 0
        status, seconds = finish(place, steps)
        found = look.found_at(place)
        problems = look.unequal(found, expected) + look.gone(before, found)
        unwell = look.unwell_at(place)
        journal.write(
            kind="end",
            time=time.time(),
            run=run,
            status=status,
            seconds=round(seconds, 1),
            reused=reused_in(place.output, since),
            resumed_at=look.resumed_at(place.home),
            lost=problems,
            unwell=unwell,
        )
        say(f"run {run} ended with {status}: lost {problems or 0}, unwell {unwell or 0}")


def _unexpected(outcome: Outcome) -> str | None:
    """An attempt that failed by itself, which none may."""
    if outcome.hit == "step" and outcome.status == 1:  # the worker's, which has lost a step
        return None
    if outcome.status in (0, -signal.SIGKILL):
        return None
    return f"ended by itself with {outcome.status}"


def _looked_at(
    place: Place, before: dict[str, list[str]], expected: look.Found, orphans: list[int]
) -> tuple[look.Found, list[str]]:
    """Once more where orphans of a killed worker may have published meanwhile."""
    for attempt in range(10):
        found = look.found_at(place)
        problems = look.lost(before, found, expected)
        if not problems or not orphans or attempt == 9:
            break
        time.sleep(1.0)
    return found, problems
