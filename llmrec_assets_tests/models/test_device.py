"""The dtype a model computes in, by device."""

import pytest
import torch

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.models import device as devices
from llmrec_assets.models.device import pick_device, usable_dtype


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_DEVICE", "cpu")


def test_a_cpu_without_bfloat16_products_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch has them all the same, element by element, a hundred times slower."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    device = pick_device()
    assert usable_dtype(device, "bfloat16") == torch.float32
    assert usable_dtype(device, "float32") == torch.float32
    assert device.name.endswith(", float32 only")


def test_a_cpu_with_bfloat16_products_computes_in_what_the_recipe_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "_cpu_multiplies_bfloat16", lambda: True)
    device = pick_device()
    assert usable_dtype(device, "bfloat16") == torch.bfloat16
    assert usable_dtype(device, "float32") == torch.float32
    assert device.name.endswith(" threads")


def test_a_device_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_DEVICE", "tpu")
    with pytest.raises(ModelError, match="LLMREC_DEVICE is 'tpu', expected cuda, mps or cpu"):
        pick_device()
