"""Room on the disk, asked before a training and not found out in the middle of it.

What belongs here: how much a training writes, and whether there is room. What does not: making
room (``retention``).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.model_files import lora_parameters

#: Trainer checkpoints at a time: the two that are kept, and the one being written.
_CHECKPOINTS = 3
#: Bytes for a trained parameter in one of them: itself and Adam's two moments, in float32.
_BYTES = 12
_BESIDES = 50 * 2**20  # tokenizer, tables, logs, the report


def training_space(base_model: Path, *ranks: int) -> int:
    """Bytes that a training of LoRA adapters of these ranks on ``base_model`` (a published
    directory) writes at most: its trainer's checkpoints and the published adapter."""
    trained = sum(lora_parameters(base_model, rank) for rank in ranks)
    return trained * (_CHECKPOINTS * _BYTES + 4) + _BESIDES


def require_space(directory: Path, needed: int, what: str) -> None:
    """Refuses to start what will not fit.

    Args:
        needed: bytes.

    Raises:
        StoreError: less is free; says how much.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise StoreError(
            f"{what} needs about {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free on the "
            f"disk of {directory}: nothing was started. Make room (`llmrec prune` lists old "
            "versions that may go), or set LLMREC_HOME to a directory on a larger disk"
        )
