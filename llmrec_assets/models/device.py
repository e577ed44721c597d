"""Which device a model runs on, and what it used there.

What belongs here: choosing cuda / mps / cpu, the dtype it can use, peak memory, leaving the
device empty. What does not: who may use the device when (``orchestration.resources``).
"""

from __future__ import annotations

import gc
import os
import resource
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from llmrec_assets.ground.errors import ModelError

DeviceType = Literal["cuda", "mps", "cpu"]


@dataclass(frozen=True)
class Device:
    """A device to run on. ``key`` names the physical device: two processes that see the same
    card get the same key."""

    type: DeviceType
    name: str
    key: str

    @property
    def torch(self) -> torch.device:
        return torch.device(self.type)


def pick_device() -> Device:
    """The best device at hand: cuda, then mps, then cpu. ``LLMREC_DEVICE`` overrides.

    Raises:
        ModelError: ``LLMREC_DEVICE`` names no known device, or one that is not there.
    """
    wanted = os.environ.get("LLMREC_DEVICE", "")
    if wanted not in ("", "cuda", "mps", "cpu"):
        raise ModelError(f"LLMREC_DEVICE is {wanted!r}, expected cuda, mps or cpu")
    if wanted in ("", "cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device("cuda", properties.name, f"cuda-{properties.uuid}")
    if wanted in ("", "mps") and torch.backends.mps.is_available():
        return Device("mps", "Apple GPU", "mps")
    if wanted in ("cuda", "mps"):
        raise ModelError(f"LLMREC_DEVICE is {wanted}, but PyTorch sees no such device here")
    arithmetic = "" if _cpu_multiplies_bfloat16() else ", float32 only"
    return Device("cpu", f"CPU, {torch.get_num_threads()} threads{arithmetic}", "cpu")


def usable_dtype(device: Device, wanted: str) -> torch.dtype:
    """The wanted dtype where the device computes in it, else float32.

    Without vector instructions for it (an x86 CPU before AVX-512, which is most laptops) PyTorch
    multiplies bfloat16 element by element: an SFT step of SmolLM2 took 407 s instead of seconds.
    """
    if wanted == "bfloat16":
        if device.type == "cuda" and not torch.cuda.is_bf16_supported():
            return torch.float32
        if device.type == "cpu" and not _cpu_multiplies_bfloat16():
            return torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def _cpu_multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 products for this CPU: the question PyTorch itself asks."""
    return bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def without_cudnn_attention(device: torch.device) -> None:
    """On cuda this process computes no attention with cuDNN, which plans anew for every length of
    rows: with batches of eight prompts an SFT step of Llama-3.2-1B took 0.29 s on an H100, six
    times what its kernels did. PyTorch's other ways remain."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def peak_memory_gb(device: Device) -> float:
    """Peak memory so far in GB: of the card on cuda, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def empty_device(device: Device | torch.device) -> None:
    """Frees what the last model left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif device.type == "mps":
        torch.mps.empty_cache()
