"""Rows of different lengths as one row, without padding between them.

What belongs here: where each token of such a row stands, and the way to padded rows and back, which
attention alone needs. What does not: attention (``fast_layers``), losses, token ids.

All layers but attention work token by token, so padding would be work for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch.autograd.function import once_differentiable


class Rows(TypedDict):
    """Where the N tokens of b rows, at most L long, stand: ``places``, int64 [N], in b · L padded
    places; ``sources``, int64 [b · L], which token a place shows (in padding any). ``shape``:
    (b, L)."""

    places: torch.Tensor
    sources: torch.Tensor
    shape: tuple[int, int]


def rows_of(lengths: Sequence[int]) -> Rows:
    """Rows of these lengths, one behind the other."""
    n, longest = len(lengths), max(lengths)
    within = torch.arange(longest).expand(n, longest)
    filled = within < torch.tensor(lengths)[:, None]
    places = filled.flatten().nonzero()[:, 0]
    sources = torch.zeros(n * longest, dtype=torch.int64)
    sources[places] = torch.arange(len(places))
    return {"places": places, "sources": sources, "shape": (n, longest)}


def positions(lengths: Sequence[int]) -> torch.Tensor:
    """Each token's position in its row, int64 [N]."""
    return torch.cat([torch.arange(length) for length in lengths])


class _Padded(torch.autograd.Function):
    """[N, f] → [b · L, f]; what padding shows counts for nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, places: torch.Tensor, sources: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x[sources]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return dy[places], None, None


class _Packed(torch.autograd.Function):
    """[b · L, f] → [N, f]."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.length = len(y)
        return y[places]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return dx.new_zeros(ctx.length, *dx.shape[1:]).index_copy_(0, places, dx), None


def padded(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[1, N, heads, d] as [b, L, heads, d], padded on the right. A causal attention over it must
    not read what its padding gives: no gradient comes back from there."""
    n, longest = rows["shape"]
    if x.shape[1] == n * longest:
        return x.view(n, longest, *x.shape[2:])
    flat = _Padded.apply(x[0].flatten(1), rows["places"], rows["sources"])
    return flat.view(n, longest, *x.shape[2:])


def packed(y: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[b, L, heads, d] as [1, N, heads · d], without its padding."""
    flat = y.flatten(2).flatten(0, 1)
    if len(flat) != len(rows["places"]):
        flat = _Packed.apply(flat, rows["places"])
    return flat[None]
