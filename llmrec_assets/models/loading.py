"""Loading a policy: the base model, with the adapter of a stage merged into it.

What belongs here: directories in, a model ready to generate or to train on out. What does not:
which directories (the store knows), training, generation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_policy(
    base_dir: Path, adapter_dir: Path | None, *, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any]:
    """Returns (model in eval mode, tokenizer).

    The adapter is merged in float32 and cast once, so that merging adds one rounding, not two.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    if adapter_dir is None:
        model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
        model = model.to(dtype)
    return model.to(device).eval(), tokenizer
