"""Asking a base model the memorisation questions.

What belongs here: the raw continuation of each prompt, greedy. What does not: the questions and
their score (``ground.memorisation``); a continuation quotes the source and is never published.

Prompts are given as plain text, without the chat template: a file seen in pre-training was seen
as a file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrec_assets.ground.memorisation import Question
from llmrec_assets.ground.recipes import GenerationRecipe
from llmrec_assets.models.device import Device, peak_memory_gb, usable_dtype
from llmrec_assets.models.loading import load_policy, precision
from llmrec_assets.models.memory import FittingBatches
from llmrec_assets.models.packed import pack
from llmrec_assets.models.progress import Progress, ProgressEvent, silent
from llmrec_assets.models.sampling import Decoding, Sample, sample_tokens

#: Tokens that a continuation may take more than the longest true answer of its batch: another
#: spelling of a title may be longer.
_ROOM = 8


def continue_rows(
    base_dir: Path,
    questions: Sequence[Question],
    recipe: GenerationRecipe,
    *,
    device: Device,
    progress: Progress = silent,
) -> tuple[list[str], dict[str, Any]]:
    """The greedy continuation of every question's prompt, and facts about the run.

    Args:
        base_dir: the base model.
        recipe: batch size and dtype; the probe is greedy whatever else it says.

    Returns:
        One text per question, in their order; seconds, peak memory and device.
    """
    started = time.monotonic()
    model, tokenizer = load_policy(
        base_dir, [], dtype=usable_dtype(device, recipe.dtype), device=device.torch
    )
    pack(model)
    # With special tokens: a model trained with a first token knows a text by it.
    asked = [tokenizer(question.prompt)["input_ids"] for question in questions]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    stops = [tokenizer.eos_token_id, *(newline if len(newline) == 1 else [])]
    lengths = [
        len(tokenizer(question.answer, add_special_tokens=False)["input_ids"])
        for question in questions
    ]

    def continued(batch: Sequence[int]) -> list[list[Sample]]:
        decoding = Decoding(max(lengths[i] for i in batch) + _ROOM, do_sample=False)
        with precision(model):
            return sample_tokens(
                model,
                [asked[i] for i in batch],
                [[0] for _ in batch],  # greedy reads no noise
                decoding,
                stops=stops,
                pad=tokenizer.pad_token_id,
            )

    batches = FittingBatches(
        what="memorisation",
        item="prompt",
        size=recipe.batch_size,
        device=device.torch,
        remedy="a smaller probes.context_rows",
        progress=progress,
    )
    order = sorted(range(len(asked)), key=lambda i: (len(asked[i]), i))
    texts: dict[int, str] = {}
    for batch, answers in batches.map(order, continued):
        for index, (answer,) in zip(batch, answers, strict=True):
            texts[index] = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        per_second = len(texts) / (time.monotonic() - started)
        progress(
            ProgressEvent(
                what="memorisation",
                step=len(texts),
                total=len(questions),
                examples_per_second=per_second,
                seconds_left=(len(questions) - len(texts)) / per_second,
            )
        )
    return [texts[i] for i in range(len(questions))], {
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_gb": round(peak_memory_gb(device), 2),
        "device": device.name,
    }
