"""The token loop: prompts in, sampled tokens out, with noise that is named, not drawn.

What belongs here: the noise, the distribution a token is drawn from, and one decode loop that
sampled responses, test responses and PPO's rollouts share. What does not: computing the prompts
(``prefill``), texts and their repeats (``sampled``, ``generation``), recipes.

The noise of a sample is a function of its stream's key and the token's position alone, so neither
the batch nor its order matters. What is left of the batch is the rounding of the logits: in float32
it moves the border between two tokens by about 1e-7, so that practically no sample changes; in
bfloat16 some do (``bench/sampling_batch_size.py`` counts them).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.models.fast_layers import last_positions
from llmrec_assets.models.memory import FittingBatches
from llmrec_assets.models.prefill import CACHE, Prefill, prefill

#: Tokens whose weights are summed at once in a draw.
_SECTION = 512


@dataclass(frozen=True)
class Sample:
    """One answer. ``stop`` is the token that ended it, not part of ``tokens``; None: it was cut at
    ``max_new_tokens``."""

    tokens: list[int]
    stop: int | None


@dataclass(frozen=True)
class Decoding:
    """How a token follows from its logits: temperature, then ``top_k`` (0: off), then ``top_p``
    (1: off), as in transformers. Not ``do_sample``: the likeliest token."""

    max_new_tokens: int
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Constraint(Protocol):
    """What may follow in each sample. A sample is known by its place among all samples, prompt by
    prompt."""

    def mask(self, logits: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """The logits [n, vocabulary] of the samples ``rows``, -inf where a token may not follow.
        Samples that have ended may be among them."""

    def advance(self, row: int, token: int) -> None:
        """Sample ``row`` continues, or ends, with ``token``."""


def stream(seed: int, *parts: int | str) -> int:
    """The 64-bit key of the noise stream that ``seed`` and ``parts`` name, on every platform."""
    # JSON keeps 1, "1" and the borders between parts apart.
    name = json.dumps([int(seed), *(p if isinstance(p, str) else int(p) for p in parts)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def uniforms(keys: np.ndarray, position: int) -> np.ndarray:
    """One number in [0, 1) per key, for the token at ``position``: SplitMix64 (Steele, Lea and
    Flood, 2014) started at the key.

    Args:
        keys: keys as ``stream`` makes them, uint64 [n].

    Returns:
        float64 [n], multiples of 2^-52, so that times any float64 they stay below it.
    """
    z = keys + np.array([(position + 1) * 0x9E3779B97F4A7C15 % 2**64], dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(12)) * 2.0**-52


def next_tokens(logits: torch.Tensor, decoding: Decoding, noise: np.ndarray) -> torch.Tensor:
    """Draws one token a row by the inverse of the cumulative distribution in vocabulary order.

    Args:
        logits: [n, vocabulary], any float type.
        noise: numbers in [0, 1), [n]; greedy decoding does not read them.

    Returns:
        Token ids [n] on the logits' device; the vocabulary's size where the logits are not numbers.
    """
    if not decoding.do_sample:
        likeliest = logits.argmax(dim=-1)
        return likeliest.masked_fill(logits.isnan().any(dim=-1), logits.shape[-1])
    weights = _weights(logits, decoding)
    if weights.device.type == "mps":  # it has no float64
        weights = weights.cpu()
    return _drawn(weights, torch.from_numpy(noise).to(weights.device)).to(logits.device)


def _drawn(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The first token of each row whose cumulative weight is past ``noise`` [n] of the row's sum:
    never one of weight zero.

    Sums of ``_SECTION`` tokens find the section, and only there tokens are summed one by one.
    """
    n, vocabulary = weights.shape
    pad = -vocabulary % _SECTION
    sections = torch.nn.functional.pad(weights, (0, pad)).view(n, -1, _SECTION)
    # A float32 sum over a vocabulary would be off by more than its rare tokens weigh.
    cumulative = sections.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    # Times the sum: weights need not add up to one exactly, nor at all after top_p.
    target = noise[:, None] * cumulative[:, -1:]
    section = torch.searchsorted(cumulative, target, right=True)
    # Not a number: beyond the vocabulary, as the caller is told.
    beyond = (section == cumulative.shape[-1])[:, 0]
    section = section.clamp(max=cumulative.shape[-1] - 1)
    within = sections.gather(1, section[:, :, None].expand(-1, -1, _SECTION))[:, 0]
    before = cumulative.gather(1, section) - within.sum(dim=-1, dtype=torch.float64)[:, None]
    past = before + within.cumsum(dim=-1, dtype=torch.float64) > target
    past &= within > 0
    # Rounding may put the target past the section's own sum: its last token that weighs something.
    last = _SECTION - 1 - within.gt(0).flip(-1).byte().argmax(dim=-1)
    place = torch.where(past.any(dim=-1), past.byte().argmax(dim=-1), last)
    return (section[:, 0] * _SECTION + place).masked_fill(beyond, vocabulary)


def _weights(logits: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Float32 weights [n, vocabulary], in proportion to the probabilities drawn from."""
    logits = logits.float()
    if decoding.temperature != 1:
        logits = logits / decoding.temperature
    if 0 < decoding.top_k < logits.shape[-1]:
        least = logits.topk(decoding.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    weights = logits.softmax(dim=-1)
    if decoding.top_p < 1:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        # The likeliest tokens up to and with the one that reaches top_p.
        before = ordered.cumsum(dim=-1) - ordered
        weights = torch.zeros_like(weights).scatter(
            -1, order, ordered.masked_fill(before >= decoding.top_p, 0)
        )
    return weights


@torch.inference_mode()
def sample_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    streams: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stops: Sequence[int],
    pad: int,
    constraint: Constraint | None = None,
    prefilled: Prefill | None = None,
) -> list[list[Sample]]:
    """Samples each prompt once per stream. The prompt itself is computed once, or was before.

    Args:
        model: a causal language model of the Llama family in eval mode, with or without peft.
        prompts: token ids, none empty; they are padded on the left to the longest.
        streams: per prompt the keys of its samples' noise; their number may differ, and be zero.
        stops: token ids that end an answer.
        pad: any token id; what it says is masked.
        constraint: what may follow; None: anything.
        prefilled: these prompts, where another decoding has computed them.

    Returns:
        Per prompt its samples, in the order of its streams.

    Raises:
        ValueError: the model is in training mode, where dropout would decide the samples.
        ModelError: the model's logits are not numbers.
    """
    if model.training:
        raise ValueError("sample_tokens needs the model in eval mode: call model.eval() first")
    ends = set(stops)
    prompt_of = [i for i, keys in enumerate(streams) for _ in keys]
    if not prompt_of:
        return [[] for _ in prompts]
    keys = np.array([key for keys in streams for key in keys], dtype=np.uint64)
    begun = prefilled or prefill(model, prompts, pad)
    cache, mask, logits = begun.cache_for(prompts), begun.mask, begun.logits
    del begun  # unless the caller keeps them, the prompts' own cache goes as this one grows
    if prompt_of != list(range(len(prompts))):
        index = torch.tensor(prompt_of, device=model.device)
        cache.batch_select_indices(index)
        logits, mask = logits[index], mask[index]
    positions = mask.sum(dim=-1, keepdim=True)

    tokens: list[list[int]] = [[] for _ in prompt_of]
    stopped: list[int | None] = [None] * len(prompt_of)
    rows = np.arange(len(prompt_of))  # which sample each row of the batch is
    live = np.ones(len(rows), dtype=bool)
    for step in range(decoding.max_new_tokens):
        if constraint is not None:
            logits = constraint.mask(logits, rows)
        drawn = next_tokens(logits, decoding, uniforms(keys[rows], step))
        for place, token in enumerate(drawn.tolist()):
            if not live[place]:
                continue
            if token >= logits.shape[-1]:
                raise ModelError(
                    "the model's logits are not numbers (NaN or infinite), so no token can be "
                    "drawn: its weights are damaged or its training diverged; train it again with "
                    "a lower learning rate"
                )
            if constraint is not None:
                constraint.advance(int(rows[place]), token)
            if token in ends:
                stopped[rows[place]] = token
                live[place] = False
            else:
                tokens[rows[place]].append(token)
        if not live.any() or step + 1 == decoding.max_new_tokens:
            break
        # Rows that have ended cost as much as live ones; dropping them copies the cache, so not
        # each by itself.
        if 4 * np.count_nonzero(~live) >= len(live):
            index = torch.from_numpy(np.flatnonzero(live)).to(model.device)
            cache.batch_select_indices(index)
            mask, positions, drawn = mask[index], positions[index], drawn[index]
            rows, live = rows[live], live[live]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
        logits = model(
            input_ids=drawn[:, None],
            attention_mask=mask,
            position_ids=positions,
            **{CACHE: cache},
            use_cache=True,
            logits_to_keep=last_positions(1),
        ).logits[:, -1]
        positions = positions + 1

    samples = iter(map(Sample, tokens, stopped))
    return [[next(samples) for _ in keys] for keys in streams]


def sample_rows(
    model: Any,
    prompts: Sequence[Sequence[int]],
    streams: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stops: Sequence[int],
    pad: int,
    rows: FittingBatches,
) -> list[list[Sample]]:
    """``sample_tokens`` without a constraint, at most as many samples at once as fit.

    Args:
        rows: their number; a prompt's samples may be parted.
    """
    asked = [(prompt, key) for prompt, keys in enumerate(streams) for key in keys]

    def run(batch: Sequence[tuple[int, int]]) -> list[list[Sample]]:
        keys_of: dict[int, list[int]] = {}
        for prompt, key in batch:
            keys_of.setdefault(prompt, []).append(key)
        return sample_tokens(
            model,
            [prompts[i] for i in keys_of],
            list(keys_of.values()),
            decoding,
            stops=stops,
            pad=pad,
        )

    drawn = [sample for _, found in rows.map(asked, run) for samples in found for sample in samples]
    samples = iter(drawn)
    return [[next(samples) for _ in keys] for keys in streams]
