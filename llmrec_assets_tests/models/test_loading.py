"""Loading a policy: what answers is what was trained."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.ground.recipes import BaseModelRecipe, LoraRecipe
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.loading import load_policy, precision
from llmrec_assets.models.training import lora_config, save_adapter

CPU = torch.device("cpu")
TINY = BaseModelRecipe(source="tiny", name="tiny", dtype="float32", label="tiny", seed=3)
IDS = torch.arange(5, 45).reshape(2, 20)


def test_nobody_is_told_of_a_training():
    code = (
        "import llmrec_assets.models.sft, huggingface_hub.constants as c; "
        "print(c.HF_HUB_DISABLE_TELEMETRY)"
    )
    switches = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
    env = {name: value for name, value in os.environ.items() if name not in switches}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.strip() == "True"


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    return prepare_base_model(TINY, tmp_path_factory.mktemp("base") / "files")[0]


def _adapter(base_dir: Path, directory: Path, seed: int, size: float) -> Path:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = get_peft_model(base, lora_config(LoraRecipe(r=4, alpha=4), "CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn_like(parameter))
    return save_adapter(model, directory, "base")


def _logits(model) -> torch.Tensor:
    with torch.no_grad(), precision(model):
        return model(input_ids=IDS).logits.float()


def test_two_adapters_add_up(base_dir: Path, tmp_path: Path) -> None:
    first = _adapter(base_dir, tmp_path / "sft", 1, 0.1)
    second = _adapter(base_dir, tmp_path / "dpo", 2, 0.1)
    both, _ = load_policy(base_dir, [first, second], dtype=torch.float32, device=CPU)
    merged, _ = load_policy(base_dir, [first], dtype=torch.float32, device=CPU)
    alone = _logits(merged)
    live = PeftModel.from_pretrained(merged, second).eval()
    assert torch.allclose(_logits(both), _logits(live), atol=1e-4)
    assert not isinstance(both, PeftModel), "in float32 nothing is lost by merging"
    assert not torch.allclose(_logits(both), alone, atol=1e-2)


def test_a_small_step_from_the_sft_policy_is_not_rounded_away(
    base_dir: Path, tmp_path: Path
) -> None:
    """In bfloat16 the policy is the merged SFT policy plus the live adapter, as it was trained."""
    first = _adapter(base_dir, tmp_path / "sft", 1, 0.1)
    none = _adapter(base_dir, tmp_path / "none", 2, 0.0)
    small = _adapter(base_dir, tmp_path / "small", 2, 1e-4)
    bf16 = {"dtype": torch.bfloat16, "device": CPU}
    still, _ = load_policy(base_dir, [first, none], **bf16)
    assert precision(still)._enabled
    moved, _ = load_policy(base_dir, [first, small], **bf16)
    reference, _ = load_policy(base_dir, [first], **bf16)
    assert not precision(reference)._enabled
    weights = dict(reference.named_parameters())
    for name, parameter in moved.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32, "the adapter keeps its precision"
        else:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, weights[plain])
    step = (_logits(moved) - _logits(still)).abs()
    assert float(step.mean()) > 0, "the adapter answers, however small"


def test_a_diverged_adapter_is_not_written(base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"diverged .*learning_rate"):
        _adapter(base_dir, tmp_path / "nan", 1, float("nan"))
