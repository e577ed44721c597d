"""Loading a policy: the base model, with the adapter of a stage merged into it.

What belongs here: directories in, a model ready to generate or to train on out. What does not:
which directories (the store knows), training, generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrec_assets.models.device import without_cudnn_attention


def load_policy(
    base_dir: Path, adapters: Sequence[Path], *, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any]:
    """Returns (model in eval mode, tokenizer).

    The first adapter, SFT's, is merged in float32 and cast once. DPO's and RLHF's adapters were
    trained on top of that merged policy: in bfloat16 the policies of ``[sft, dpo]`` and ``[sft,
    rlhf]`` keep theirs live, as it was trained. Merged into bfloat16 weights, a small adapter would
    drown in the rounding (measured on SmolLM2 after PPO: half of the distance from the SFT policy
    was rounding). In float32 nothing drowns, and a live adapter costs a quarter of an answer's
    time: it is merged, too. Compute under ``precision``.
    """
    without_cudnn_attention(device)
    tokenizer = load_tokenizer(base_dir)
    if not adapters:
        model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapters[0]).merge_and_unload().to(dtype)
        for adapter in adapters[1:]:
            model = PeftModel.from_pretrained(model, adapter)
            if dtype == torch.float32:
                model = model.merge_and_unload()
    return model.to(device).eval(), tokenizer


def load_tokenizer(base_dir: Path) -> Any:
    """The base model's tokenizer; no stage changes it."""
    return AutoTokenizer.from_pretrained(base_dir)


def precision(model: Any) -> torch.autocast:
    """The autocast a policy computes in: that of the trainings where an adapter is live on a
    bfloat16 base, none otherwise."""
    live = isinstance(model, PeftModel) and model.dtype == torch.bfloat16
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=live)
