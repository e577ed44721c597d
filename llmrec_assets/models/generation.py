"""Answers to prompts, as raw text.

What belongs here: batched greedy or sampled generation. What does not: reading the answers
(``ground.completions``, ``ground.grounding``): raw text is kept, so a better parser re-scores
without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmrec_assets.ground.recipes import GenerationRecipe
from llmrec_assets.models.chat import prompt_ids, stop_ids
from llmrec_assets.models.progress import Progress, ProgressEvent, silent


@dataclass(frozen=True)
class Response:
    """One answer. ``finished``: it ended by itself rather than at ``max_new_tokens``."""

    text: str
    n_prompt_tokens: int
    n_response_tokens: int
    finished: bool


@torch.inference_mode()
def generate_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    recipe: GenerationRecipe,
    *,
    seed: int,
    what: str = "generation",
    progress: Progress = silent,
) -> list[Response]:
    """One response per prompt, in the order of ``prompts``.

    Prompts of similar length share a batch (left padding costs compute). Sampling is seeded per
    batch; greedy decoding, the default, needs no seed.
    """
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(asked)), key=lambda i: (len(asked[i]), i))
    stops = stop_ids(tokenizer, model)
    responses: dict[int, Response] = {}
    started = time.monotonic()
    for start in range(0, len(order), recipe.batch_size):
        batch = order[start : start + recipe.batch_size]
        torch.manual_seed(seed + start)
        for index, response in zip(
            batch,
            _generate_batch(model, tokenizer, [asked[i] for i in batch], recipe, stops),
            strict=True,
        ):
            responses[index] = response
        per_second = len(responses) / (time.monotonic() - started)
        progress(
            ProgressEvent(
                what=what,
                step=len(responses),
                total=len(prompts),
                examples_per_second=per_second,
                seconds_left=(len(prompts) - len(responses)) / per_second,
            )
        )
    return [responses[i] for i in range(len(prompts))]


def _generate_batch(
    model: Any, tokenizer: Any, asked: list[list[int]], recipe: GenerationRecipe, stops: list[int]
) -> list[Response]:
    width = max(map(len, asked))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(a)) + a for a in asked], device=model.device)
    mask = torch.tensor([[0] * (width - len(a)) + [1] * len(a) for a in asked], device=model.device)
    # An Instruct model's own generation config carries top_k and top_p: always pass all four.
    sampling: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_k": None,
        "top_p": None,
    }
    if recipe.do_sample:
        sampling = {
            "do_sample": True,
            "temperature": recipe.temperature,
            "top_k": recipe.top_k,
            "top_p": recipe.top_p,
        }
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=recipe.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=pad,
        **sampling,
    )
    responses = []
    for row, question in zip(output[:, width:].tolist(), asked, strict=True):
        # The pad token may be an end token: cut at the first end, whatever follows is padding.
        end = next((i for i, token in enumerate(row) if token in stops), None)
        answer = row if end is None else row[:end]
        responses.append(
            Response(
                text=tokenizer.decode(answer, skip_special_tokens=True),
                n_prompt_tokens=len(question),
                n_response_tokens=len(answer),
                finished=end is not None,
            )
        )
    return responses
