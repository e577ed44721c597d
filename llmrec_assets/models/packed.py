"""An output layer whose weight is laid out once, for a CPU that only reads it.

What belongs here: ``pack``. What does not: the layers of a training, whose weights change
(``fast_layers``).

A decode step multiplies a few rows by every weight of the model. PyTorch's float32 product lays the
weight out for the machine's vector units at each call, which for the widest layer costs more than
the product: SmolLM2's output layer takes 36 ms for 16 rows, and 14 ms laid out beforehand (2 cores,
AVX2, torch 2.13). Narrow layers gain nothing, and with one row they lose. The price is the output
layer's memory once more.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch

#: Rows the layout is chosen for. Layouts for 16 to 2,048 rows were as fast; one for one row not.
_ROWS = 32
_OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")


class PackedLinear(torch.nn.Linear):
    """torch's layer; without gradients and in float32, over the weight as oneDNN wants it."""

    _packed: torch.Tensor
    _packed_from: tuple[int, int] | None

    def pack(self) -> None:
        """Lays the weight out as it is now."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), _ROWS)
        self._packed_from = self._state()

    def _state(self) -> tuple[int, int]:
        """Another one after a write to the parameter, or where its memory was replaced."""
        return self.weight._version, self.weight.data_ptr()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._packed_from = None  # moved or converted
        return super()._apply(fn, recurse)

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
    """Lays out the weight of a model's float32 output layer on a CPU, in place.

    What the layer computes stays the same up to rounding. Elsewhere, in bfloat16 (not measured), in
    an output layer with an adapter and where PyTorch was built without oneDNN nothing happens.

    Args:
        model: a causal language model to read from, with or without live adapters. A parameter
            that is written to, moved or converted afterwards counts; a write that goes around
            PyTorch's count of them (``weight.data``) does not. It can no longer be copied
            (``copy.deepcopy``).
    """
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    if not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS):
        return
    layer = model.get_output_embeddings()
    # Nothing derived: peft's layers compute more than their base.
    if type(layer) is not torch.nn.Linear or layer.weight.dtype != torch.float32:
        return
    if layer.weight.is_inference():  # PyTorch does not count the writes to it
        return
    cast(Any, layer).__class__ = PackedLinear
    PackedLinear.pack(cast(PackedLinear, layer))
