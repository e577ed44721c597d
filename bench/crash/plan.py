"""When and whom each kill of a run is aimed at, from a seed and an undisturbed run's trace.

What belongs here: drawing. What does not: carrying it out (``matrix``).

Two kills of a run come while the command starts. Half of the others come at a random moment of the
run's time, so that what takes long is hit often. Saving a training state and publishing take
milliseconds: the other half come at a random file operation, each kind of operation as often as any
other. A run's kills come in the order of the timeline (every second run: in random order), so that
each training is hit before it is done.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Target = Literal["command", "step", "worker", "group"]
How = Literal["start-up", "time", "file"]


@dataclass(frozen=True)
class Kill:
    """One kill: ``how`` it is aimed (``seconds`` after the start; after ``step`` has begun; before
    that does ``operation`` to a file), and whom it hits: the command (one process), one step
    process, the run worker alone, or the worker with all its steps. ``begins``: when that step
    began undisturbed; both are seconds at the undisturbed run's pace."""

    run: int
    number: int
    target: Target
    how: How
    cold: bool = False
    step: str = ""
    begins: float = 0.0
    seconds: float = 0.0
    operation: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Undisturbed:
    """An undisturbed run's trace. ``steps``: (step, began, ended) in seconds; ``operations``: when
    which step did what to files; ``start_up``: seconds of a cold start up to the first step."""

    steps: Sequence[tuple[str, float, float]]
    operations: Sequence[tuple[float, str, str]]
    start_up: float


#: What goes on from a saved state, and takes most of a real run.
TRAININGS = (
    "sft_checkpoint",
    "sampled_responses",
    "dpo_checkpoint",
    "reward_model",
    "rlhf_checkpoint",
)
#: Also where the training is published already and nothing but the pointer is written.
_KINDS_OF_EVERY_ATTEMPT = ("table file", "table pointer", "checkpoint pointer", "views")
_KINDS = (
    *_KINDS_OF_EVERY_ATTEMPT,
    "checkpoint file",
    "file to be published",
    "training state",
)


def kind_of(operation: str) -> str:
    """``rename tables/prompts/sample/crash/current.json`` → ``table pointer``, …"""
    _, path = operation.split(" ", 1)
    top, *inside = path.split("/")
    if top == "work":
        state = any(part.startswith(("checkpoint-", "batch-", "unfinished")) for part in inside)
        return "training state" if state else "file to be published"
    if top in ("tables", "checkpoints"):
        singular = top.removesuffix("s")
        return f"{singular} pointer" if "current.json" in path else f"{singular} file"
    return "views" if "warehouse" in top else "locks"


def kills_of_run(
    run: int, n: int, undisturbed: Undisturbed, *, seed: int, steps: bool
) -> list[Kill]:
    """The kills of a run, in the order in which they come.

    Args:
        steps: the run has a process per step: steps, the worker, or all are killed.
    """
    rng = random.Random(f"{seed}/{run}")
    shuffled = run % 2 == 0
    kinds = _KINDS_OF_EVERY_ATTEMPT if shuffled else _KINDS
    by_kind: dict[str, list[tuple[str, str]]] = {}
    first_time: dict[tuple[str, str], float] = {}
    for moment, step, operation in undisturbed.operations:
        if (step, operation) in first_time or step == "-":
            continue
        first_time[step, operation] = moment
        if kind_of(operation) in kinds:
            by_kind.setdefault(kind_of(operation), []).append((step, operation))
    began = {step: start for step, start, _ in undisturbed.steps}
    drawn: list[tuple[float, dict[str, Any]]] = []
    for number in range(n):
        if number < 2:
            cold = number == 0 and not steps
            latest = undisturbed.start_up if cold else 1.2 * undisturbed.steps[0][1]
            seconds = rng.uniform(0.0, latest)
            aim = {"how": "start-up", "cold": cold, "seconds": seconds}
            drawn.append((number - 2, {"target": "worker" if steps else "command", **aim}))
        elif number % 2:
            first, last = undisturbed.steps[0][1], undisturbed.steps[-1][2]
            moment = rng.uniform(first, last)
            step = max((s for s in began if began[s] <= moment), key=lambda s: began[s])
            target = rng.choice(("step", "worker", "group")) if steps else "command"
            aim = {"how": "time", "step": step, "begins": began[step]}
            aim["seconds"] = moment - began[step]
            drawn.append((moment, {"target": target, **aim}))
        else:
            step, operation = rng.choice(by_kind[rng.choice(sorted(by_kind))])
            target = "step" if steps else "command"
            aim = {"target": target, "how": "file", "step": step, "operation": operation}
            drawn.append((first_time[step, operation], aim))
    if shuffled:
        rng.shuffle(drawn)
    else:
        drawn.sort(key=lambda pair: pair[0])
    return [Kill(run, number, **aim) for number, (_, aim) in enumerate(drawn)]


def kills_in_trainings(run: int, n: int, undisturbed: Undisturbed, *, seed: int) -> list[Kill]:
    """The kills of a run that is hit in its trainings alone, in the order of the timeline: half of
    them at a random moment, half at a random file operation below a work directory or a
    checkpoint's place."""
    rng = random.Random(f"{seed}/{run}/trainings")
    spans = [(s, start, end) for s, start, end in undisturbed.steps if s in TRAININGS]
    operations = [
        (moment, step, operation)
        for moment, step, operation in undisturbed.operations
        if step in TRAININGS and kind_of(operation) in ("training state", "checkpoint file")
    ]
    drawn: list[tuple[float, dict[str, Any]]] = []
    for number in range(n):
        if number % 2:
            step, begins, ends = rng.choices(spans, [end - start for _, start, end in spans])[0]
            seconds = rng.uniform(0.0, ends - begins)
            aim = {"how": "time", "step": step, "begins": begins, "seconds": seconds}
            drawn.append((begins + seconds, aim))
        else:
            moment, step, operation = rng.choice(operations)
            drawn.append((moment, {"how": "file", "step": step, "operation": operation}))
    drawn.sort(key=lambda pair: pair[0])
    return [Kill(run, number, "command", **aim) for number, (_, aim) in enumerate(drawn)]


def from_json(fact: Mapping[str, Any]) -> Undisturbed:
    return Undisturbed(
        [(step, began, ended) for step, began, ended in fact["steps"]],
        [(moment, step, what) for moment, step, what in fact["operations"]],
        fact["start_up"],
    )
