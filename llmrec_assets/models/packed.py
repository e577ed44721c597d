"""Linear layers whose weights are laid out once, for a CPU that only reads them.

What belongs here: ``pack``. What does not: the layers of a training, whose weights change
(``fast_layers``).

A decode step multiplies a few rows by every weight of the model. PyTorch's float32 product lays the
weight out for the machine's vector units at each call, which for few rows costs more than the
product: SmolLM2's output layer takes 36 ms for 16 rows, and 14 ms laid out beforehand; a whole step
178 ms and 147 ms (2 cores, AVX2, torch 2.13). The price is the weights' memory once more.
"""

from __future__ import annotations

from typing import Any, cast

import torch

#: Rows a layout is chosen for. Layouts for 16 to 2,048 rows were as fast; one for a single row not.
_ROWS = 32


class PackedLinear(torch.nn.Linear):
    """torch's layer; without gradients and in float32, over the weight as oneDNN wants it."""

    _packed: torch.Tensor
    _packed_from: tuple[int, int]

    def pack(self) -> None:
        """Lays the weight out as it is now."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), _ROWS)
        self._packed_from = self._state()

    def _state(self) -> tuple[int, int]:
        """Another one after every write to the weight, or where it was replaced."""
        return self.weight._version, self.weight.data_ptr()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if (
            torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or input.dtype != torch.float32
            or input.numel() == 0
            or self._state() != self._packed_from
        ):
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")


def pack(model: Any) -> None:
    """Lays out the weights of a model's float32 linear layers on a CPU, in place.

    What the layers compute stays the same up to rounding. Elsewhere, in bfloat16 (not measured) and
    where PyTorch was built without oneDNN nothing happens. A layer whose weight is written to
    afterwards computes as torch's does. A packed model cannot be copied (``copy.deepcopy``).

    Args:
        model: a model to read from, with or without live adapters.
    """
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        # Nothing derived: peft's layers compute more than their base.
        if type(module) is torch.nn.Linear and module.weight.dtype == torch.float32:
            module.__class__ = PackedLinear
            PackedLinear.pack(cast(PackedLinear, module))
