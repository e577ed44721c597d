"""What every stage of ``make bench`` shares: fresh processes, turns, medians, rows of the table.

A stage is a module in ``bench/stages`` with ``rows(bench: Bench) -> list[Row]``. Most have one
input, one function of ours and one or two peers: a ``Comparison`` makes their row. What a stage
asserts, it asserts before its row exists, so a figure in the table is a figure of equal results.

A side is measured in a process of its own, which imports first, then times (``Timer``), then writes
what it made for the check. Memory is the peak of that whole process, libraries included.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
OURS = "ours"


class Timer:
    """Adds up what ran inside it; ``times`` scales a part that was measured on a share."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.scaled = False

    @contextmanager
    def __call__(self, times: float = 1.0) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.seconds += times * (time.perf_counter() - wall)
        self.cpu_seconds += times * (time.process_time() - cpu)
        self.scaled = self.scaled or times != 1.0


#: ``side(inputs, out, timer)``: reads ``inputs``, times the work, writes its result below ``out``.
Side = Callable[[Path, Path, Timer], None]


@dataclass(frozen=True)
class Run:
    """One run of a side in its own process."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    scaled: bool


@dataclass(frozen=True)
class Figure:
    """A side's runs; the median is what the table shows."""

    runs: Sequence[Run]

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(run.cpu_seconds for run in self.runs)

    @property
    def peak_mb(self) -> float:
        return max(run.peak_mb for run in self.runs)

    def told(self) -> str:
        all_seconds = [run.seconds for run in self.runs]
        spread = f" ({min(all_seconds):.3g}–{max(all_seconds):.3g})" if len(all_seconds) > 1 else ""
        scaled = ", scaled" if self.runs[0].scaled else ""
        return f"{self.seconds:.3g} s{spread}{scaled}; {self.peak_mb:,.0f} MB"


@dataclass(frozen=True)
class Peer:
    """Somebody else's way to the same result, and how many times its time ours should go into."""

    name: str
    side: str
    goal: float
    repeats: int = 3


@dataclass(frozen=True)
class Row:
    """A row of the table; cells are text, ``goals`` says of each goal whether it is met."""

    stage: str
    ours: str
    peers: Sequence[tuple[str, str]] = ()
    """per peer: its figure, the ratio with its goal"""
    floor: str = "–"
    exponent: str = "–"
    goals: Mapping[str, bool] = field(default_factory=dict)
    notes: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    """raw numbers, for the JSON beside the table"""


@dataclass(frozen=True)
class Bench:
    """Where a stage may write, and how often it measures."""

    work: Path
    repeats: int

    def directory(self, *parts: str) -> Path:
        path = self.work.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True)
class Comparison:
    """One input, ours and the peers in turns, in one run of the bench.

    Args:
        stage: module in ``bench/stages``; its functions are named by ``ours`` and ``Peer.side``.
        title: what the table says.
        prepare: ``(directory, size)`` writes an input and returns what it is.
        small, full: input sizes; peers run on the full one, ours on both, for the exponent.
        check: ``(inputs, out by side)`` asserts that the results are equal (or better by a stated
            measure) and returns what it found.
        floor: ``(inputs)`` returns seconds no way of doing it can undercut, and why.
    """

    stage: str
    title: str
    prepare: Callable[[Path, int], str]
    small: int
    full: int
    ours: str
    peers: Sequence[Peer]
    check: Callable[[Path, Mapping[str, Path]], str]
    floor: Callable[[Path], tuple[float, str]] | None = None
    exponent_goal: float | None = None
    memory_goal_mb: float | None = None

    def row(self, bench: Bench) -> Row:
        inputs = {size: bench.directory(self.stage, str(size)) for size in (self.small, self.full)}
        told = {size: self.prepare(path, size) for size, path in inputs.items()}
        turns = {OURS: (self.ours, self.full, bench.repeats)}
        turns["ours, a tenth"] = (self.ours, self.small, bench.repeats)
        for peer in self.peers:
            turns[peer.name] = (peer.side, self.full, min(peer.repeats, bench.repeats))
        out = {name: bench.directory(self.stage, "out", str(i)) for i, name in enumerate(turns)}
        runs: dict[str, list[Run]] = {name: [] for name in turns}
        for turn in range(bench.repeats):
            # forwards and backwards, so that nobody always runs in another's wake
            for name in list(turns)[:: 1 if turn % 2 == 0 else -1]:
                side, size, repeats = turns[name]
                if turn < repeats:
                    runs[name].append(measure(self.stage, side, inputs[size], out[name]))
        held = self.check(
            inputs[self.full], {name: path for name, path in out.items() if "tenth" not in name}
        )
        return self._row(
            {name: Figure(some) for name, some in runs.items()}, told[self.full], held, inputs
        )

    def _row(
        self, figures: Mapping[str, Figure], told: str, held: str, inputs: Mapping[int, Path]
    ) -> Row:
        ours, tenth = figures[OURS], figures["ours, a tenth"]
        goals, peers = {}, []
        for peer in self.peers:
            ratio = figures[peer.name].seconds / ours.seconds
            goals[f"{ratio:.3g} × {peer.name}, goal {peer.goal:g} ×"] = ratio >= peer.goal
            peers.append(
                (f"{peer.name}: {figures[peer.name].told()}", f"{ratio:.3g} × (≥ {peer.goal:g})")
            )
        exponent = math.log(ours.seconds / tenth.seconds) / math.log(self.full / self.small)
        if self.exponent_goal is not None:
            goal = self.exponent_goal
            goals[f"exponent {exponent:.2f}, goal at most {goal:.2f}"] = exponent <= goal
        if self.memory_goal_mb is not None:
            goals[f"{ours.peak_mb:,.0f} MB, goal {self.memory_goal_mb:,.0f} MB"] = (
                ours.peak_mb <= self.memory_goal_mb
            )
        notes = [f"{self.stage}: {told}. {held}"]
        floor = "–"
        raw: dict[str, Any] = {name: vars_of(figure) for name, figure in figures.items()}
        if self.floor is not None:
            seconds, why = self.floor(inputs[self.full])
            floor = f"{seconds:.3g} s (ours {ours.seconds / seconds:.3g} ×)"
            notes.append(f"{self.stage}, floor: {why}")
            raw["floor"] = seconds
        notes.append(
            f"{self.stage}, CPU seconds (median, all threads): "
            + "; ".join(f"{name} {figure.cpu_seconds:.3g}" for name, figure in figures.items())
        )
        return Row(
            self.title,
            ours.told(),
            peers,
            floor,
            f"{exponent:.2f} ({self.small:,} → {self.full:,})",
            goals,
            notes,
            raw,
        )


def vars_of(figure: Figure) -> list[dict[str, Any]]:
    return [vars(run) for run in figure.runs]


def measure(stage: str, side: str, inputs: Path, out: Path, limit_s: float = 900) -> Run:
    """Runs one side in a fresh process.

    Raises:
        RuntimeError: it failed or took longer than ``limit_s``.
    """
    command = [sys.executable, "-m", "bench.frame", stage, side, str(inputs), str(out)]
    done = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, timeout=limit_s, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{stage}, {side} failed:\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"  {stage}, {side}: {found['seconds']:.3g} s", file=sys.stderr, flush=True)
    return Run(**found)


def peak_mb() -> float:
    """The most memory this process ever held, in 10^6 bytes.

    Linux' VmHWM begins anew with the program; ``ru_maxrss`` would still know the parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main(arguments: Sequence[str]) -> None:
    """The process of one run: ``stage side inputs out``."""
    stage, side, inputs, out = arguments
    timer = Timer()
    function: Side = getattr(importlib.import_module(f"bench.stages.{stage}"), side)
    function(Path(inputs), Path(out), timer)
    run = Run(timer.seconds, timer.cpu_seconds, peak_mb(), timer.scaled)
    print(json.dumps(vars(run)))


def table(rows: Sequence[Row]) -> str:
    """All rows as one Markdown table, the notes and the goals below it."""
    width = max((len(row.peers) for row in rows), default=0)
    peers = "".join(f" peer {i + 1} | peer {i + 1} / ours (goal) |" for i in range(width))
    lines = [
        f"| stage | ours |{peers} floor | exponent, input × 10 | goals |",
        "|---|---|" + "---|---|" * width + "---|---|---|",
    ]
    for row in rows:
        told = [*row.peers, *[("–", "–")] * (width - len(row.peers))]
        met = "–" if not row.goals else "met" if all(row.goals.values()) else "**not met**"
        pairs = [cell for pair in told for cell in pair]
        lines.append(
            "| " + " | ".join([row.stage, row.ours, *pairs, row.floor, row.exponent, met]) + " |"
        )
    lines.append("")
    lines += [f"- {note}" for row in rows for note in row.notes]
    missed = [f"{row.stage}: {goal}" for row in rows for goal, met in row.goals.items() if not met]
    lines += ["", "Goals that are not met: " + ("; ".join(missed) or "none")]
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores, system and versions, for the head of the table."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    names = (
        *("numpy", "pandas", "pyarrow", "duckdb", "rapidfuzz", "lenskit", "dagster"),
        *("torch", "transformers", "trl", "peft", "xllamacpp"),
    )

    def told(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"no {name}"

    libraries = ", ".join(map(told, names))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return (
        f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, commit {commit}, {model}, "
        f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {libraries}; load before (1, 5, 15 min): {load}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
