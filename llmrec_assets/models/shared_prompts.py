"""A preference pair as one row: its prompt, computed once, and both answers behind it.

What belongs here: the row, what may attend to what in it, and where each answer is read. What does
not: losses (``dpo``, ``reward``), the attention itself (``fast_layers``, transformers).

An answer's tokens stand at the positions they have right behind the prompt and attend to the prompt
and to their own answer, so every number is the one of a row of its own, up to rounding, in a model
whose layers attend to the whole past. Where prompts are four times as long as answers, a pair costs
three fifths of two rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PROMPT, CHOSEN, REJECTED, PADDING = range(4)


@dataclass(frozen=True)
class PairCollator:
    """Makes a batch of token ids: ``input_ids``, ``position_ids`` and ``parts`` (whose a token is),
    each int64 [pairs, length], padded on the right.

    Args:
        pad: any token id; nothing reads it.
        floats: names of numbers that go along, each [pairs].
    """

    pad: int
    floats: tuple[str, ...] = ()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = []
        for example in examples:
            prompt, chosen, rejected = (
                example[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
            )
            sizes = [len(prompt), len(chosen), len(rejected)]
            behind = [list(range(sizes[0], sizes[0] + size)) for size in sizes[1:]]
            rows.append(
                (
                    [*prompt, *chosen, *rejected],
                    [*range(sizes[0]), *behind[0], *behind[1]],
                    [PROMPT] * sizes[0] + [CHOSEN] * sizes[1] + [REJECTED] * sizes[2],
                )
            )
        width = max(len(ids) for ids, _, _ in rows)
        batch = {
            name: torch.tensor([row[i] + [fill] * (width - len(row[i])) for row in rows])
            for i, (name, fill) in enumerate(
                (("input_ids", self.pad), ("position_ids", 0), ("parts", PADDING))
            )
        }
        numbers = {
            name: torch.tensor([example[name] for example in examples], dtype=torch.float32)
            for name in self.floats
        }
        return batch | numbers


def visible(parts: torch.Tensor) -> torch.Tensor:
    """What may attend to what, bool [pairs, 1, length, length]: an earlier token of the prompt or
    of the same part."""
    length = parts.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=parts.device).tril_()
    keys, queries = parts[:, None, :], parts[:, :, None]
    return (earlier & ((keys == PROMPT) | (keys == queries)))[:, None]


def model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of a model's forward pass."""
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": visible(batch["parts"]),
        "use_cache": False,
    }


def predicted_from(parts: torch.Tensor) -> torch.Tensor:
    """For every token the place whose output predicts it, int64 [pairs, length]: the one before,
    for an answer's first token the prompt's last. Undefined in prompt and padding."""
    before = torch.arange(parts.shape[1], device=parts.device).expand_as(parts) - 1
    prompt_end = (parts == PROMPT).sum(dim=1, keepdim=True) - 1
    starts = torch.zeros_like(parts, dtype=torch.bool)
    starts[:, 1:] = parts[:, 1:] != parts[:, :-1]
    return torch.where(starts, prompt_end, before)


def ends(parts: torch.Tensor) -> torch.Tensor:
    """Where the chosen and the rejected answer end, int64 [pairs, 2]."""
    behind = [(parts <= part).sum(dim=1) for part in (CHOSEN, REJECTED)]
    return torch.stack(behind, dim=1) - 1
