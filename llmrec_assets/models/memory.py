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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    "cannot allocate memory",  # safetensors, of a file to map
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

    ``item`` names one of them, for messages; ``remedy``: what in the recipe makes one smaller.
    """

    what: str
    item: str
    size: int | None
    device: torch.device
    remedy: str
    progress: Progress = silent
    halved: bool = False

    def map(
        self, items: Sequence[Item], run: Callable[[Sequence[Item]], Found]
    ) -> Iterator[tuple[Sequence[Item], Found]]:
        """(batch, ``run(batch)``) one after the other. A batch that does not fit is run again in
        smaller ones: ``run`` must not leave anything half done.

        Raises:
            OutOfMemoryError: not even one item fits.
        """
        start = 0
        while start < len(items):
            end = len(items) if self.size is None else start + self.size
            batch = items[start:end]
            try:
                found = run(batch)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = _first_line(error)
            else:
                yield batch, found
                start += len(batch)
                continue
            self._halve(len(batch), reason)

    def _halve(self, size: int, reason: str) -> None:
        empty_device(self.device)
        if size == 1:
            raise OutOfMemoryError(
                _nothing_fits(self.what, self.item, self.device, self.remedy, reason)
            )
        self.size, self.halved = size // 2, True
        note = (
            f"{self.what}: out of memory with {size} {self.item}s at a time ({reason}); going on "
            f"with {self.size}"
        )
        self.progress(_note(self.what, note))


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
