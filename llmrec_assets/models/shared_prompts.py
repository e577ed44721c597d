"""A preference pair as one row: its prompt, computed once, and both answers behind it.

What belongs here: the row, what may attend to what in it, and where each answer is read. What does
not: losses (``dpo``, ``reward``), the attention itself (``fast_layers``, transformers).

An answer's tokens stand at the positions they have right behind the prompt and attend to the prompt
and to their own answer, so every number is the one of a row of its own, up to rounding. Where
prompts are four times as long as answers, a pair costs three fifths of two rows.

That holds where a mask is obeyed and positions are told by number. Eager attention adds the mask to
the scores, sliding windows are lost to it, recurrent layers do not look at it: models that are not
known to be fit get a row an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmrec_assets.models.fast_layers import ATTENTION

#: ``model_type`` of models whose layers all attend to the whole past, by rotary positions.
_FIT = {"llama"}

PROMPT, CHOSEN, REJECTED, PADDING = range(4)
_NAMES = {CHOSEN: "chosen_ids", REJECTED: "rejected_ids"}


@dataclass(frozen=True)
class PairCollator:
    """Makes a batch of token ids: ``input_ids``, ``position_ids`` and ``parts`` (whose a token is),
    each int64 [rows, length], padded on the right.

    Args:
        pad: any token id; nothing reads it.
        shared: a row a pair; else a row an answer, all chosen ones before all rejected ones.
        floats: names of numbers that go along, each [pairs].
    """

    pad: int
    shared: bool = True
    floats: tuple[str, ...] = ()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        both = (CHOSEN, REJECTED)
        kinds = [both] if self.shared else [(part,) for part in both]
        rows = [_row(example, answers) for answers in kinds for example in examples]
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


def _row(
    example: Mapping[str, Any], answers: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Token ids, positions and parts of a prompt and some of its answers."""
    ids = list(example["prompt_ids"])
    size = len(ids)
    positions, parts = list(range(size)), [PROMPT] * size
    for part in answers:
        answer = example[_NAMES[part]]
        ids += answer
        positions += range(size, size + len(answer))
        parts += [part] * len(answer)
    return ids, positions, parts


def is_fit(model: Any) -> bool:
    """Whether the model gives a pair in one row what it gives two rows."""
    config = model.config
    obeys = getattr(config, "_attn_implementation", None) in ("sdpa", ATTENTION)
    return obeys and config.model_type in _FIT


def by_pair(found: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Numbers of a batch's rows for (chosen, rejected), [rows, 2], as [pairs, 2]; of a row with one
    answer the other's are not read."""
    if _is_shared(parts):
        return found
    chosen, rejected = found.chunk(2)
    return torch.stack([chosen[:, 0], rejected[:, 1]], dim=1)


def _is_shared(parts: torch.Tensor) -> bool:
    """No answer is empty, so a first row with both says that all have both."""
    return bool((parts[0] == CHOSEN).any() and (parts[0] == REJECTED).any())


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
        # padded on the right: without a mask, too, no answer of a row of its own sees padding
        "attention_mask": visible(batch["parts"]) if _is_shared(batch["parts"]) else None,
        "use_cache": False,
    }


def predicted_from(parts: torch.Tensor) -> torch.Tensor:
    """For every token the place whose output predicts it, int64 [rows, length]: the one before,
    for an answer's first token the prompt's last. Undefined in prompt and padding."""
    before = torch.arange(parts.shape[1], device=parts.device).expand_as(parts) - 1
    prompt_end = (parts == PROMPT).sum(dim=1, keepdim=True) - 1
    starts = torch.zeros_like(parts, dtype=torch.bool)
    starts[:, 1:] = parts[:, 1:] != parts[:, :-1]
    return torch.where(starts, prompt_end, before)


def ends(parts: torch.Tensor) -> torch.Tensor:
    """Where the chosen and the rejected answer end, int64 [rows, 2]; of a row with one answer the
    other's place is any of the row's."""
    behind = [(parts <= part).sum(dim=1) for part in (CHOSEN, REJECTED)]
    return torch.stack(behind, dim=1) - 1
