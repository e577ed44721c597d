"""Out of memory on the device: recognised, and gone on from with smaller batches.

What belongs here: halving until a batch fits, for trainings (accumulation makes up for it) and for
inference, and what is said when not even one example does. What does not: who may use the device
(``orchestration.resources``), disk space (``ground.space``).

The kernel of a machine without a limit of its own kills a process that takes too much of the main
memory; that is no error here but a kill, after which a training is resumed.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import psutil
import torch

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.models.device import Device, empty_device
from llmrec_assets.models.progress import Progress, ProgressEvent, silent

#: What allocators and libraries write into a plain ``RuntimeError``, lower case: the allocators of
#: the CPU, of MPS and of the CUDA driver, cuBLAS and cuDNN, C++.
_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "status_alloc_failed",
    "bad_alloc",
)
#: In a work directory, once a size did not fit: [[step it began at, examples at a time], …].
_SIZES = "micro_batch_sizes.json"

Item = TypeVar("Item")
Found = TypeVar("Found")


class OutOfMemoryError(ModelError):
    """Nothing fits on the device; the message says what would."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whichever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def train_in_fitting_batches(
    train: Callable[[int], Found],
    *,
    what: str,
    micro_batch_size: int,
    batch_size: int,
    work_dir: Path,
    stands_at: Callable[[], int],
    device: Device,
    remedy: str,
    progress: Progress = silent,
) -> tuple[Found, dict[str, Any]]:
    """Calls ``train`` with the micro batch size that fits; returns what it returns, and facts.

    Where the device runs out of memory, the next try has at most half as many examples at a time;
    it must build everything anew and resume what ``work_dir`` holds. A size found is kept there, so
    that a training that is killed goes on with it. Optimizer steps see the same examples whatever
    the size: only sizes that divide ``batch_size`` are tried.

    Args:
        train: one try, with the number of examples at a time.
        micro_batch_size: the recipe's, tried first.
        batch_size: examples of an optimizer step.
        stands_at: the step a next try would resume at.
        remedy: what in the recipe makes a single example smaller.

    Facts: ``micro_batch_size_used``, the last, and ``micro_batch_sizes``, [[first step, size], …].

    Raises:
        OutOfMemoryError: not even one example at a time fits.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    kept = work_dir / _SIZES
    sizes = _read_sizes(kept) or [[0, micro_batch_size]]
    while True:
        size = sizes[-1][1]
        try:
            result = train(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = _first_line(error)
        else:
            return result, {"micro_batch_size_used": size, "micro_batch_sizes": sizes}
        # Out of the handler: the error holds the frames, and these hold the tensors.
        empty_device(device)
        if size == 1:
            raise OutOfMemoryError(_nothing_fits(what, "example", device, remedy, reason))
        step = stands_at()
        smaller = max(n for n in range(1, size // 2 + 1) if batch_size % n == 0)
        sizes = [[at, n] for at, n in sizes if at < step] + [[step, smaller]]
        _write(kept, sizes)
        note = (
            f"{what}: out of memory with {size} examples at a time ({reason}); going on from step "
            f"{step} with {smaller}, {batch_size // smaller} times a step: the same {batch_size} "
            "examples as before"
        )
        progress(_note(what, note))


@dataclass
class FittingBatches:
    """Batches for inference: of at most ``size`` items (None: all at once), halved for good where
    the device runs out of memory.

    ``item`` names one of them, for messages; ``remedy``: what in the recipe makes one smaller;
    ``lanes``: how many batches run side by side, each in a thread of its own with its share of
    PyTorch's threads (``cpu_lanes``).
    """

    what: str
    item: str
    size: int | None
    device: torch.device
    remedy: str
    progress: Progress = silent
    halved: bool = False
    lanes: int = 1

    def map(
        self, items: Sequence[Item], run: Callable[[Sequence[Item]], Found]
    ) -> Generator[tuple[Sequence[Item], Found]]:
        """(batch, ``run(batch)``) in the order of the items. A batch that does not fit is run again
        in smaller ones: ``run`` must not leave anything half done.

        With lanes ``run`` is called from several threads at once, without the caller's modes of
        gradients and autocast, and each lane takes the memory of a batch. A closed lane ends where
        ``run`` calls ``leave_closed_lane``.

        Raises:
            OutOfMemoryError: not even one item fits.
        """
        start = 0
        while start < len(items):
            size = self._size(len(items) - start)
            batches = [items[at : at + size] for at in range(start, len(items), size)]
            reason = None
            # Closed before anything smaller is tried: by then no other batch holds memory.
            with closing(_side_by_side(batches, run, self.lanes)) as results:
                for batch, outcome in zip(batches, results, strict=True):
                    if isinstance(outcome, _DoesNotFit):
                        reason = outcome.reason
                        break
                    yield batch, outcome
                    start += len(batch)
            if reason is not None:
                self._make_room(min(size, len(items) - start), reason)

    def _size(self, left: int) -> int:
        """Of the next batches: ``size``, or less where that keeps all lanes busy to the end."""
        size = self.size or left
        if self.lanes == 1:
            return size
        rounds = -(-left // (size * self.lanes))
        return -(-left // (rounds * self.lanes))

    def _make_room(self, size: int, reason: str) -> None:
        empty_device(self.device)
        if self.lanes > 1:
            # What did not fit may fit alone.
            self.size, self.lanes = self.size or size, 1
            then = "one batch at a time"
        elif size == 1:
            raise OutOfMemoryError(
                _nothing_fits(self.what, self.item, self.device, self.remedy, reason)
            )
        else:
            self.size, self.halved = size // 2, True
            then = str(self.size)
        note = (
            f"{self.what}: out of memory with {size} {self.item}s at a time ({reason}); going on "
            f"with {then}"
        )
        self.progress(_note(self.what, note))


@dataclass(frozen=True)
class _DoesNotFit:
    """Without the error: it holds the frames, and these hold the tensors."""

    reason: str


def _side_by_side(
    batches: Sequence[Sequence[Item]], run: Callable[[Sequence[Item]], Found], lanes: int
) -> Generator[Found | _DoesNotFit]:
    """``run`` of each batch, in order; at most ``lanes`` are under way or wait to be taken.

    Closing it, by an error or an interrupt too, waits until those under way have left.
    """

    def outcome(batch: Sequence[Item]) -> Found | _DoesNotFit:
        try:
            return run(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return _DoesNotFit(_first_line(error))

    lanes = min(lanes, len(batches))
    if lanes < 2:
        yield from map(outcome, batches)
        return
    threads = torch.get_num_threads()
    shares: SimpleQueue[int] = SimpleQueue()
    for lane in range(lanes):
        shares.put(max(1, threads // lanes + (lane < threads % lanes)))
    closed = threading.Event()

    def enter() -> None:
        torch.get_num_threads()  # the first call in a thread sets what another thread set last
        torch.set_num_threads(shares.get())  # of this thread, and oneDNN's and MKL's in it
        _lane.closed = closed

    pool = ThreadPoolExecutor(lanes, initializer=enter)
    try:
        rest = iter(batches)
        # Some wait, so that a lane that is done early goes on at once.
        under_way = deque(pool.submit(outcome, batch) for batch in islice(rest, 2 * lanes))
        while under_way:
            yield under_way.popleft().result()
            under_way.extend(pool.submit(outcome, batch) for batch in islice(rest, 1))
    finally:
        closed.set()
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


#: Of each thread of a lane: ``closed``, an event.
_lane = threading.local()


class LaneClosedError(Exception):
    """Nobody waits for this batch any more."""


def leave_closed_lane() -> None:
    """Between the steps of a batch: ends it where its lane was closed.

    Raises:
        LaneClosedError: it was.
    """
    closed: threading.Event | None = getattr(_lane, "closed", None)
    if closed is not None and closed.is_set():
        raise LaneClosedError


def cpu_lanes(device: torch.device) -> int:
    """How many batches of an inference run side by side: on a CPU as many as it has threads, at
    most four; elsewhere one.

    A decode step's products have a few rows, too little work for several threads to share: each
    waits for the others at every one of them (measured on two threads, docs/performance.md).
    """
    return min(torch.get_num_threads(), 4) if device.type == "cpu" else 1


def _note(what: str, note: str) -> ProgressEvent:
    return ProgressEvent(what, step=0, total=0, examples_per_second=0, seconds_left=0, note=note)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = re.sub(r"^\[enforce fail.*?\] .*?\. ", "", text.splitlines()[0])
    return line.split(" Error code")[0][:300].rstrip(" .")


def _nothing_fits(
    what: str, item: str, device: Device | torch.device, remedy: str, reason: str
) -> str:
    return (
        f"{what} does not fit on the device, not even one {item} at a time ({reason}). What would "
        f"fit: {remedy}; a smaller base_model; or a device with more memory than this one "
        f"({_memory(device)})"
    )


def _memory(device: Device | torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return f"{device.type}, {total / 1e9:.1f} GB, {free / 1e9:.1f} GB of it free"


def _read_sizes(path: Path) -> list[list[int]] | None:
    """None where no size was found yet; a damaged file is none."""
    try:
        sizes = [[int(at), int(n)] for at, n in json.loads(path.read_text())]
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return sizes if sizes and all(n > 0 for _, n in sizes) else None


def _write(path: Path, sizes: list[list[int]]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(sizes))
    os.replace(aside, path)
