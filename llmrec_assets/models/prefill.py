"""Prompts computed once, and the cache in which every decoding of them goes on.

What belongs here: the forward pass over prompts, and a cache that several decodings may begin with.
What does not: what follows a prompt (``sampling``, ``ranked``).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from llmrec_assets.models.fast_layers import last_positions

#: What a forward pass calls its cache: transformers 5.24 renamed it, 5.40 forgets the old name.
_NAMES = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in _NAMES else "past_key_values"
#: Tokens of room that the cache takes at a time.
_ROOM = 32


@dataclass(frozen=True)
class Prefill:
    """A batch of prompts, padded on the left to the longest.

    ``mask``: int64 [prompts, width], 1 where a token is no padding. ``logits``: [prompts,
    vocabulary], of the first token that may follow.
    """

    mask: torch.Tensor
    logits: torch.Tensor
    _layers: Sequence[RoomyLayer]

    def cache_for(self, prompts: Sequence[Sequence[int]]) -> Cache:
        """A cache that begins with the prompts, which must be these. It shares their memory until
        it grows, and changes nothing in it.

        Raises:
            ValueError: they are not as many or not as long.
        """
        if [len(p) for p in prompts] != self.mask.sum(dim=-1).tolist():
            raise ValueError("these are not the prompts that were computed")
        return Cache(layers=[layer.forked() for layer in self._layers])


@torch.inference_mode()
def prefill(model: Any, prompts: Sequence[Sequence[int]], pad: int) -> Prefill:
    """Computes prompts.

    Args:
        model: a causal language model of the Llama family in eval mode, with or without peft.
        prompts: token ids, none empty.
        pad: any token id; what it says is masked.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0),
        **{CACHE: cache},
        use_cache=True,
        logits_to_keep=last_positions(1),
    ).logits[:, -1]
    return Prefill(mask, logits, cache.layers)


class RoomyLayer(DynamicLayer):
    """A cache layer with room ahead, once it has grown. ``DynamicLayer`` copies the whole layer for
    every token, half of a float32 step (SmolLM2's shape, 80 rows of 300 tokens, one core,
    measured).

    It grows, keeps or repeats rows, and is forked; what else ``DynamicLayer`` offers knows nothing
    of the room.
    """

    keys: torch.Tensor
    values: torch.Tensor
    #: With room; ``keys`` and ``values`` are views of what is filled. None: they are another's.
    _keys: torch.Tensor | None = None
    _values: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [rows, heads, new, size] keys and values; returns all of them, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        keys, values = self._keys, self._values
        if keys is None or values is None or keys.shape[2] < end:
            # A prompt takes no room: what follows it moves it, perhaps several times over. Beams
            # bring many positions a step: room for several steps of as many.
            room = max(_ROOM, 4 * key_states.shape[2]) if start else 0
            keys = self._moved(self.keys, key_states, start, end + room)
            values = self._moved(self.values, value_states, start, end + room)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        return self._hold(keys, values, end)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows, or repeats them; with room, since something follows."""
        length = self.get_seq_length()
        size = (len(indices), self.keys.shape[1], length + _ROOM, self.keys.shape[3])
        keys, values = self.keys.new_empty(size), self.values.new_empty(size)
        torch.index_select(self.keys, 0, indices, out=keys[:, :, :length])
        torch.index_select(self.values, 0, indices, out=values[:, :, :length])
        self._hold(keys, values, length)

    def forked(self) -> RoomyLayer:
        """A layer that begins with what this one holds, and moves before it writes."""
        other = RoomyLayer()
        other.lazy_initialization(self.keys, self.values)
        other.keys, other.values = self.keys, self.values
        return other

    def _hold(
        self, keys: torch.Tensor, values: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._keys, self._values = keys, values
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        return self.keys, self.values

    @staticmethod
    def _moved(held: torch.Tensor, like: torch.Tensor, length: int, size: int) -> torch.Tensor:
        room = like.new_empty(like.shape[0], like.shape[1], size, like.shape[3])
        if length:
            room[:, :, :length] = held
        return room
