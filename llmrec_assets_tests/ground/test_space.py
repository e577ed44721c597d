"""Room is asked for before a training, in numbers that fit what a training writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.model_files import lora_parameters
from llmrec_assets.ground.space import require_space, training_space


def safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """The header alone: shapes are all that is read."""
    entries = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.fixture
def smollm2(tmp_path: Path) -> Path:
    """SmolLM2-135M's shapes, in two files."""
    layer = {
        "self_attn.q_proj": [576, 576],
        "self_attn.k_proj": [192, 576],
        "self_attn.v_proj": [192, 576],
        "self_attn.o_proj": [576, 576],
        "mlp.gate_proj": [1536, 576],
        "mlp.up_proj": [1536, 576],
        "mlp.down_proj": [576, 1536],
    }
    shapes = {
        f"model.layers.{n}.{name}.weight": shape for n in range(30) for name, shape in layer.items()
    }
    norms = {f"model.layers.{n}.input_layernorm.weight": [576] for n in range(30)}
    safetensors(tmp_path / "model-1.safetensors", shapes | norms)
    safetensors(
        tmp_path / "model-2.safetensors",
        {"model.embed_tokens.weight": [49152, 576], "lm_head.weight": [49152, 576]},
    )
    return tmp_path


def test_an_adapters_parameters_are_those_that_peft_trains(smollm2: Path) -> None:
    # what peft reported for r = 32 on every linear layer of SmolLM2-135M
    assert lora_parameters(smollm2, 32) == 9_768_960
    assert lora_parameters(smollm2, 16) * 2 == 9_768_960


def test_a_training_needs_its_checkpoints_and_the_adapter(smollm2: Path) -> None:
    one = training_space(smollm2, 32)
    # the adapter is 39 MB, a trainer checkpoint with its optimizer three times that
    assert 39e6 + 3 * 117e6 < one < 39e6 + 3 * 118e6 + 60e6
    assert training_space(smollm2, 32, 32) - one == pytest.approx(one - training_space(smollm2))


def test_too_little_room_says_how_much_and_what_to_do(tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    require_space(tmp_path, 99 * 10**6, "training sft_checkpoint for sample|tiny")
    with pytest.raises(
        StoreError,
        match=r"training sft_checkpoint for sample\|tiny needs about 450 MB, and 100 MB are free "
        r"on the disk of .*nothing was started\. Make room \(`llmrec prune`",
    ):
        require_space(tmp_path, 450 * 10**6, "training sft_checkpoint for sample|tiny")
