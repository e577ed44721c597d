"""Answers to prompts, as raw text.

What belongs here: one answer per prompt and decoding, in batches: free text or a constrained list
(``sampled_answers``), or a ranking of titles (``ranked_answers``). What does not: the token loop
(``sampling``), the constraint (``constrained``), the beam search (``ranked``), reading the answers
(``ground.completions``, ``ground.grounding``): raw text is kept, so a better parser re-scores
without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmrec_assets.ground.completions import render_completion
from llmrec_assets.ground.recipes import GenerationRecipe
from llmrec_assets.models.chat import stop_ids
from llmrec_assets.models.constrained import CatalogueConstraint, ListGrammar
from llmrec_assets.models.loading import precision
from llmrec_assets.models.memory import FittingBatches
from llmrec_assets.models.prefill import Prefill, prefill
from llmrec_assets.models.progress import Progress, ProgressEvent, silent
from llmrec_assets.models.ranked import rank_titles
from llmrec_assets.models.sampling import Decoding, sample_tokens, stream
from llmrec_assets.models.trie import CatalogueTries


@dataclass(frozen=True)
class Lists:
    """What the answers of some prompts may list.

    ``open_titles``: per prompt bool [titles] (``CatalogueTries.open_titles``); ``names``: whose
    prompts they are, for errors.
    """

    tries: CatalogueTries
    names: Sequence[str]
    open_titles: Sequence[np.ndarray]


@dataclass(frozen=True)
class Response:
    """One answer. ``finished``: it ended by itself rather than at ``max_new_tokens``.
    ``n_response_tokens``: tokens generated; of a ranking, the tokens of titles that were read to
    find it. ``log_probabilities``: of a ranking's titles, best first."""

    text: str
    n_prompt_tokens: int
    n_response_tokens: int
    finished: bool
    log_probabilities: tuple[float, ...] = ()


#: Answers the prompts at these positions, which have been computed; called under ``precision``.
Answerer = Callable[[Sequence[int], Prefill], list[Response]]


def sampled_answers(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Sequence[int]],
    recipe: GenerationRecipe,
    *,
    seed: int,
    keys: Sequence[tuple[int, int]],
    lists: Lists | None = None,
) -> Answerer:
    """Sampled text, one answer a prompt.

    The noise of an answer is named by ``seed`` and the prompt's key alone: the batch changes
    nothing, and every model answers a prompt with the same noise (common random numbers), which
    sharpens paired differences between stages. Greedy decoding needs neither.

    Args:
        asked: the prompts' token ids.
        keys: (user, window) of each prompt.
        lists: constrains every response to a list of distinct open titles, drawn as the recipe
            says but for ``max_new_tokens``: no list is cut. None: free text.

    Raises:
        ModelError: a prompt has too few open titles.
    """
    streams = [[stream(seed, "response", *key)] for key in keys]
    stops = stop_ids(tokenizer, model)
    decoding = Decoding(
        max_new_tokens=recipe.max_new_tokens if lists is None else lists.tries.max_tokens,
        do_sample=recipe.do_sample,
        temperature=recipe.temperature,
        top_k=recipe.top_k,
        top_p=recipe.top_p,
    )
    if lists is not None:
        grammar = ListGrammar(lists.tries)
        starts = [grammar.start(*row) for row in zip(lists.names, lists.open_titles, strict=True)]

    def answered(batch: Sequence[int], prefilled: Prefill) -> list[Response]:
        constraint = None
        if lists is not None:
            constraint = CatalogueConstraint(grammar, [starts[i] for i in batch])
        answers = sample_tokens(
            model,
            [asked[i] for i in batch],
            [streams[i] for i in batch],
            decoding,
            stops=stops,
            pad=tokenizer.pad_token_id,
            constraint=constraint,
            prefilled=prefilled,
        )
        return [
            Response(
                text=tokenizer.decode(answer.tokens, skip_special_tokens=True),
                n_prompt_tokens=len(asked[index]),
                n_response_tokens=len(answer.tokens),
                finished=answer.stop is not None,
            )
            for index, (answer,) in zip(batch, answers, strict=True)
        ]

    return answered


def ranked_answers(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Sequence[int]],
    recipe: GenerationRecipe,
    lists: Lists,
    *,
    exact: bool = False,
) -> Answerer:
    """Per prompt its k most probable open titles, written as an answer would be.

    Args:
        asked: the prompts' token ids.
        exact: a beam for every open title, for where few are; else the recipe's ``beams``.

    An answer raises ModelError where a prompt has too few open titles.
    """

    def ranked(batch: Sequence[int], prefilled: Prefill) -> list[Response]:
        beams = recipe.beams
        if exact:
            beams = max(lists.tries.k, *(int(lists.open_titles[i].sum()) for i in batch))
        rankings = rank_titles(
            model,
            [asked[i] for i in batch],
            [lists.names[i] for i in batch],
            [lists.open_titles[i] for i in batch],
            lists.tries,
            beams=beams,
            pad=tokenizer.pad_token_id,
            prefilled=prefilled,
        )
        return [
            Response(
                text=render_completion([lists.tries.titles[title] for title in ranking.titles]),
                n_prompt_tokens=len(asked[index]),
                n_response_tokens=ranking.n_tokens,
                finished=True,
                log_probabilities=ranking.log_probabilities,
            )
            for index, ranking in zip(batch, rankings, strict=True)
        ]

    return ranked


#: Name of the seconds that computing the prompts took, for all decodings together.
PREFILL = "prefill"


def answer_in_batches(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Sequence[int]],
    answerers: Mapping[str, Answerer],
    batches: FittingBatches,
) -> tuple[dict[str, list[Response]], dict[str, float]]:
    """Every answerer's answers. A prompt is computed once for all of them.

    Prompts of similar length share a batch (left padding costs compute).

    Args:
        asked: the prompts' token ids.
        answerers: by decoding.
        batches: how many at once (``fitting_batches``); told of progress after each batch.

    Returns:
        By decoding one response a prompt, in their order, and seconds; also those of ``PREFILL``.

    Raises:
        OutOfMemoryError: the device cannot hold even one prompt.
    """
    found: dict[str, dict[int, Response]] = {name: {} for name in answerers}
    seconds = dict.fromkeys([PREFILL, *answerers], 0.0)

    def run(batch: Sequence[int]) -> tuple[dict[str, list[Response]], list[float]]:
        times = [time.monotonic()]
        with precision(model):
            prefilled = prefill(model, [asked[i] for i in batch], tokenizer.pad_token_id)
            if model.device.type == "cuda":  # it runs behind: whose seconds are they?
                torch.cuda.synchronize(model.device)
            times.append(time.monotonic())
            answers = {}
            for name, answerer in answerers.items():
                answers[name] = answerer(batch, prefilled)
                times.append(time.monotonic())
        return answers, np.diff(times).tolist()

    order = sorted(range(len(asked)), key=lambda i: (len(asked[i]), i))
    began, done = time.monotonic(), 0
    for batch, (answers, spent) in batches.map(order, run):
        for name, own in answers.items():
            found[name].update(zip(batch, own, strict=True))
        for name, took in zip(seconds, spent, strict=True):
            seconds[name] += took
        done += len(batch)
        per_second = done / (time.monotonic() - began)
        batches.progress(
            ProgressEvent(
                what=batches.what,
                step=done,
                total=len(order),
                examples_per_second=per_second,
                seconds_left=(len(order) - done) / per_second,
            )
        )
    return {name: [own[i] for i in range(len(asked))] for name, own in found.items()}, seconds


def fitting_batches(
    model: Any, recipe: GenerationRecipe, what: str, progress: Progress = silent
) -> FittingBatches:
    """The recipe's ``batch_size`` prompts at once, or as many as fit on the model's device."""
    return FittingBatches(
        what=what,
        item="prompt",
        size=recipe.batch_size,
        device=model.device,
        remedy="a smaller generation.max_new_tokens or generation.beams; a shorter "
        "prompts.template",
        progress=progress,
    )
