"""Progress of a long model run, as plain values that any front end can show.

What belongs here: the event and the callback type. What does not: how it is shown (the log and
throttled ``AssetObservation``s in ``orchestration.progress``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressEvent:
    """Where a run stands. ``seconds_left`` extrapolates from this process's own speed.

    With a ``note`` it says that instead, once: what the run met and goes on from.
    """

    what: str
    step: int
    total: int
    examples_per_second: float
    seconds_left: float
    loss: float | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.note:
            return self.note
        loss = "" if self.loss is None else f", loss {self.loss:.3f}"
        return (
            f"{self.what}: {self.step}/{self.total}{loss}, "
            f"{self.examples_per_second:.2f} examples/s, {self.seconds_left:.0f} s left"
        )


Progress = Callable[[ProgressEvent], None]


def silent(event: ProgressEvent) -> None:
    """Shows nothing."""
