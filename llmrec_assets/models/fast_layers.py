"""Layers of a LoRA training with fewer passes over memory, for matrix units that wait.

What belongs here: autograd functions that compute what peft's and transformers' layers compute, in
fewer elementwise passes and with less kept for the backward pass, and ``speed_up``, which swaps
them in. What does not: losses and loops (``ppo``), adapters (``training``).

On a CPU with bfloat16 matrix units two thirds of a LoRA step are not matrix products but what
stands between them (SmolLM2, 4 x 256 tokens, profiled); on a GPU it is half. Derivatives are
written out, once differentiable; ``test_fast_layers`` holds each against autograd on the plain
formula.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from llmrec_assets.models.device import without_cudnn_attention
from llmrec_assets.models.memory import is_out_of_memory
from llmrec_assets.models.unpadded import Rows, packed, padded

#: Name under which transformers knows ``causal_attention``.
ATTENTION = "llmrec_causal"
#: The same for rows without padding (``unpadded``), which need no mask made for them.
UNPADDED_ATTENTION = "llmrec_unpadded"


class _OneKernel:
    """An elementwise function; on a GPU compiled to one kernel, where it can be.

    ``fused``: how to write it for the compiler, which likes neither views nor writes in place.
    """

    def __init__(
        self, function: Callable[..., Any], fused: Callable[..., Any] | None = None
    ) -> None:
        self._function = function
        self._fused: Callable[..., Any] | None = fused or function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *tensors: Any) -> Any:
        if not tensors[0].is_cuda or self._fused is None:
            return self._function(*tensors)
        if self._compiled is None:  # not at import: the compiler's own takes seconds
            self._compiled = torch.compile(self._fused, dynamic=True)
        try:
            # Always in one state, whoever calls: another state is compiled for anew.
            with torch.no_grad(), torch.autocast("cuda", enabled=False):
                return self._compiled(
                    *(x.detach() if isinstance(x, torch.Tensor) else x for x in tensors)
                )
        except Exception as error:  # whatever a compiler lacks here
            if is_out_of_memory(error):
                raise
            self._fused = None
            warnings.warn(
                f"torch.compile cannot be used here, trainings take longer: {error}",
                stacklevel=2,
            )
        return self._function(*tensors)


def _add_dropped(
    dx: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, scale: float
) -> torch.Tensor:
    return dx.add_(torch.ops.aten.native_dropout_backward(values, kept, scale))


_one_add_dropped = _OneKernel(
    _add_dropped, lambda dx, values, kept, scale: dx + values * kept * scale
)


class _Lora(torch.autograd.Function):
    """y = x Wᵀ + s (D(x) Aᵀ) Bᵀ (Hu et al., 2021), W frozen, D dropout. x [n, in], W [out, in],
    A [r, in], B [out, r]; A and B may be of another dtype, their gradients are of theirs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        narrow_a, narrow_b = a.to(x.dtype), b.to(x.dtype)
        seen, kept = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        inner = seen @ narrow_a.T
        y = x @ weight.T
        y.addmm_(inner, narrow_b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, narrow_a, narrow_b, inner, kept)
        ctx.scaling, ctx.dtype, ctx.dropout = scaling, a.dtype, dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, inner, kept = ctx.saved_tensors
        scale = 1 / (1 - ctx.dropout)
        d_inner = (dy @ b).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            if kept is None:
                dx.addmm_(d_inner, a)
            else:
                dx = _one_add_dropped(dx, d_inner @ a, kept, scale)
        da = db = None
        if ctx.needs_input_grad[2]:
            seen = x
            if kept is not None:
                seen = torch.ops.aten.native_dropout_backward(x, kept, scale)
            da = (d_inner.T @ seen).to(ctx.dtype)
            db = (dy.T @ inner).to(ctx.dtype).mul_(ctx.scaling)
        return dx, None, da, db, None, None


class FastLoraLinear(LoraLinear):
    """peft's layer; where one plain adapter is live, in one function."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        live = [name for name in self.active_adapters if name in self.lora_A]
        if (
            args
            or kwargs
            or self.disable_adapters
            or self.merged
            or len(live) != 1
            or live[0] in self.lora_variant
            or self.base_layer.bias is not None
            or self.base_layer.weight.requires_grad
            or x.dtype != self.base_layer.weight.dtype
        ):
            return super().forward(x, *args, **kwargs)
        (name,) = live
        dropout = self.lora_dropout[name]
        share = dropout.p if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0
        if share and not x.is_cuda:  # a CPU keeps the library's masks
            return super().forward(x, *args, **kwargs)
        y = _Lora.apply(
            x.reshape(-1, x.shape[-1]),
            self.base_layer.weight,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            share,
        )
        return y.view(*x.shape[:-1], y.shape[-1])


class _RmsNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x²) + ε) over the last dimension, statistics in float32, w frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            .square_()
            .div_(x.shape[-1])
            .add_(epsilon)
        )
        ctx.save_for_backward(x, weight, scale)
        # A copy of its own where x is float32 already.
        normal = wide * scale if wide is x else wide.mul_(scale)
        return normal.to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        # dx = s dn - x (dn · x) s³ / n, with dn = dy w: in few passes over the rows.
        wide, d_normal = x.float(), (dy * weight).float()
        inner = torch.mul(d_normal, wide).sum(dim=-1, keepdim=True)  # einsum: a product a row
        inner = inner.mul_(scale.pow(3)).div_(-x.shape[-1])
        dx = d_normal.mul_(scale).addcmul_(wide, inner)
        return dx.to(x.dtype), None, None


class FastRmsNorm(LlamaRMSNorm):
    """transformers' layer with a frozen weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.weight.requires_grad or self.weight.dtype != hidden_states.dtype:
            return super().forward(hidden_states)
        if hidden_states.is_cuda:  # PyTorch has one kernel for it; autocast would widen its output
            with torch.autocast("cuda", enabled=False):
                return torch.nn.functional.rms_norm(
                    hidden_states, self.weight.shape, self.weight, self.variance_epsilon
                )
        return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate).mul_(up)


def _swiglu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    d_up = torch.nn.functional.silu(gate).mul_(dy)
    return torch.ops.aten.silu_backward(dy * up, gate), d_up


_one_swiglu, _one_swiglu_backward = _OneKernel(_swiglu), _OneKernel(_swiglu_backward)


class _SwiGlu(torch.autograd.Function):
    """y = silu(g) u; silu(g) is computed again in the backward pass instead of kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _one_swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _one_swiglu_backward(dy, *ctx.saved_tensors)


class FastMlp(LlamaMLP):
    """transformers' layer; where the activation is SiLU, SwiGLU in one function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.config.hidden_act != "silu":
            return super().forward(x)
        gate, up = (project(x).flatten(0, -2) for project in (self.gate_proj, self.up_proj))
        return self.down_proj(_SwiGlu.apply(gate, up).view(*x.shape[:-1], -1))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + rotate_half(x) sin, both halves of cos and sin being equal (Su et al., 2021)."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def _rotated_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [
            first * cos[..., :half] - second * sin[..., :half],
            second * cos[..., half:] + first * sin[..., half:],
        ],
        dim=-1,
    )


_one_rotated = _OneKernel(_rotated, _rotated_halves)


class _Rotate(torch.autograd.Function):
    """Rotary position embedding of [tokens, heads, d] by cos and sin [tokens, 1, d]; its transpose
    is the rotation backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _one_rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _one_rotated(dy, cos, -sin), None, None


class _CausalAttention(torch.autograd.Function):
    """softmax(s q kᵀ, visible) v over [b, heads, L, d]; fewer key heads are shared by groups.

    ``visible``, bool [b, 1, L, L], says what a query sees; None: what stands up to it.

    Forward is PyTorch's tiled kernel, which keeps no L x L matrix. Its backward kernel does not use
    the matrix units; plain products over one L x L matrix at a time do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
        visible: torch.Tensor | None,
    ) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        bias = None
        if visible is not None:
            bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
        wide_k, wide_v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
        y, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, wide_k, wide_v, 0.0, visible is None, attn_mask=bias, scale=scaling
        )
        ctx.save_for_backward(q, k, v, y, log_sum, visible)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, y, log_sum, visible = ctx.saved_tensors
        rows, heads, length, size = q.shape
        shared = k.shape[1]
        groups = heads // shared
        # A key head's queries side by side: [b · key heads, groups · L, d].
        grouped = (rows * shared, groups * length, size)
        q, dy, y = (x.contiguous().view(grouped) for x in (q, dy, y))
        k, v = (x.contiguous().view(rows * shared, length, size) for x in (k, v))
        log_sum = log_sum.reshape(rows * shared, groups * length, 1)
        ones = k.new_ones(rows * shared, 2, length)
        # What a softmax takes away from each row rides in the product, as two more columns: no
        # L x L matrix is ever written in float32, nor read again for a subtraction.
        weights = torch.bmm(
            _with_column(q * ctx.scaling, -log_sum), torch.cat([k.transpose(1, 2), ones], dim=1)
        ).exp_()
        if visible is None:
            hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        else:
            hidden = (~visible).repeat_interleave(shared, dim=0)
        weights.view(-1, groups, length, length).masked_fill_(hidden, 0)
        dv = torch.bmm(weights.transpose(1, 2), dy)
        inner = torch.einsum("bld,bld->bl", dy.float(), y.float()).unsqueeze(-1)
        d_scores = torch.bmm(
            _with_column(dy, -inner), torch.cat([v.transpose(1, 2), ones], dim=1)
        ).mul_(weights)
        dq = torch.bmm(d_scores, k).mul_(ctx.scaling).view(rows, heads, length, size)
        dk = torch.bmm(d_scores.transpose(1, 2), q).mul_(ctx.scaling)
        key_shape = (rows, shared, length, size)
        return dq, dk.view(key_shape), dv.view(key_shape), None, None


def _with_column(x: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """[n, L, d] and a float32 column [n, L, 1] as [n, L, d + 2]: the column, and what rounding it
    to x's dtype left over."""
    rounded = column.to(x.dtype)
    return torch.cat([x, rounded, (column - rounded).to(x.dtype)], dim=-1)


def causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: ours where rows are whole, causal or under a mask that
    says what each position sees, else SDPA."""
    whole = query.shape[2] == key.shape[2] > 1 and _is_plain(attention_mask)
    if not whole or dropout or query.device.type != "cpu":
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = _CausalAttention.apply(query, key, value, scaling, attention_mask)
    return attended.transpose(1, 2), None


def _is_plain(mask: torch.Tensor | None) -> bool:
    """No mask, or one that says of every two positions whether one sees the other."""
    return mask is None or (mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1)


class _ChosenLogProbs(torch.autograd.Function):
    """log softmax(logits / T) at ``targets``, over one matrix that both passes work in."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        # n x vocabulary: every copy counts, so the weights stay where the logits stood.
        weights = logits.to(torch.float32, copy=True)
        if temperature != 1:
            weights.div_(temperature)
        largest = weights.amax(dim=-1, keepdim=True)
        weights.sub_(largest)
        chosen = weights.gather(-1, targets[:, None])
        total = weights.exp_().sum(dim=-1, keepdim=True)
        ctx.save_for_backward(weights, targets, total)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return (chosen - total.log())[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, targets, total = ctx.saved_tensors
        dy = dy[:, None] / ctx.temperature
        # Not in place: autograd would not tell a second backward pass that its input is gone.
        d_logits = (weights * (-dy / total)).scatter_add_(-1, targets[:, None], dy)
        return d_logits.to(ctx.dtype), None, None


def chosen_log_probs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Log-probability of ``targets`` [n] under ``logits`` [n, vocabulary] at ``temperature``, in
    nats, computed in float32."""
    return _ChosenLogProbs.apply(logits, targets, temperature)


def last_positions(n: int) -> torch.Tensor:
    """A model's ``logits_to_keep`` for the last ``n`` positions: their indices, [n].

    With a number, the model slices. A slice of several rows is not contiguous, and the output layer
    then multiplies row by row, with a copy of its whole matrix for each: 1.2 s for one position of
    16 rows instead of 2 ms (SmolLM2, bfloat16, 2 cores, torch 2.13). Indices gather.
    """
    return torch.arange(-n, 0)


AttentionInterface.register(ATTENTION, causal_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
AttentionInterface.register(UNPADDED_ATTENTION, causal_attention)
AttentionMaskInterface.register(UNPADDED_ATTENTION, lambda *args, **kwargs: None)


class FastAttention(LlamaAttention):
    """transformers' layer; whole rows without a cache rotate and attend in one function each."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        rows: Rows | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # transformers before 5.24 names the cache past_key_values
        held = () if "past_key_values" in kwargs else (cache,)
        cached = cache is not None or kwargs.get("past_key_values") is not None
        dropout = self.training and self.attention_dropout > 0
        if cached or dropout or not _is_plain(attention_mask) or position_embeddings is None:
            if rows is not None:
                raise ValueError(
                    "rows without padding are for whole rows, without attention dropout"
                )
            return super().forward(
                hidden_states, position_embeddings, attention_mask, *held, **kwargs
            )
        places = hidden_states.shape[:-1]
        # All rows' tokens side by side: one shape, whatever the rows are.
        cos, sin = (
            x.expand(*places, -1).reshape(-1, 1, self.head_dim) for x in position_embeddings
        )
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (
            project(hidden_states).view(places.numel(), -1, self.head_dim)
            for project in projections
        )
        q, k = _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)
        q, k, v = (x.view(*places, -1, self.head_dim) for x in (q, k, v))
        if rows is not None:
            q, k, v = (padded(x, rows) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attended, _ = causal_attention(self, q, k, v, attention_mask, scaling=self.scaling)
        if rows is not None:
            attended = packed(attended, rows)
        attended = attended.reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(attended), None


_FAST = {
    LoraLinear: FastLoraLinear,
    LlamaRMSNorm: FastRmsNorm,
    LlamaMLP: FastMlp,
    LlamaAttention: FastAttention,
}


def speed_up(model: Any, *, unpadded: bool = False) -> bool:
    """Swaps the layers of a model of the Llama family on a CPU or a CUDA GPU, in place; others stay
    as they are.

    What the layers compute stays the same up to rounding. For the attention to be ours, rows have
    to be padded on the right, without a mask or with one that says what each position sees.

    Args:
        model: the model, with its adapters where it has some.
        unpadded: it is asked for rows without padding only (``unpadded.rows_of``).

    Returns:
        Whether it can be asked for rows without padding.
    """
    if model.device.type not in ("cpu", "cuda"):
        return False
    without_cudnn_attention(model.device)
    whole = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    if whole.config._attn_implementation == "sdpa":  # ours computes what that does, and no more
        whole.set_attn_implementation(ATTENTION)
    for module in model.modules():
        fast = _FAST.get(type(module))
        if fast is not None:
            module.__class__ = fast
    layers = [m for m in model.modules() if isinstance(m, FastAttention)]
    unpadded &= whole.config._attn_implementation == ATTENTION
    unpadded &= len(layers) == whole.config.num_hidden_layers
    unpadded &= not any(layer.attention_dropout for layer in layers)
    if unpadded:
        whole.set_attn_implementation(UNPADDED_ATTENTION)
    return unpadded
