"""Answers to prompts, as raw text.

What belongs here: one answer per prompt, in batches, by one of the decodings: free text or a
constrained list (``generate_responses``), or a ranking of titles (``ranked_responses``). What does
not: the token loop (``sampling``), the constraint (``constrained``), the beam search (``ranked``),
reading the answers (``ground.completions``, ``ground.grounding``): raw text is kept, so a better
parser re-scores without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from llmrec_assets.ground.completions import render_completion
from llmrec_assets.ground.recipes import GenerationRecipe
from llmrec_assets.models.chat import prompt_ids, stop_ids
from llmrec_assets.models.constrained import CatalogueConstraint, ListGrammar
from llmrec_assets.models.loading import precision
from llmrec_assets.models.memory import FittingBatches
from llmrec_assets.models.progress import Progress, ProgressEvent, silent
from llmrec_assets.models.ranked import Ranking, rank_titles
from llmrec_assets.models.sampling import Decoding, Sample, sample_tokens, stream
from llmrec_assets.models.trie import CatalogueTries

Found = TypeVar("Found")


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


def generate_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    recipe: GenerationRecipe,
    *,
    seed: int,
    keys: Sequence[tuple[int, int]] | None = None,
    lists: Lists | None = None,
    what: str = "generation",
    batches: FittingBatches | None = None,
    progress: Progress = silent,
) -> list[Response]:
    """One response per prompt, in the order of ``prompts``.

    Prompts of similar length share a batch (left padding costs compute). A sampled response's noise
    is named by ``seed`` and the prompt's key alone: the batch changes nothing, and every model
    answers a prompt with the same noise (common random numbers), which sharpens paired differences
    between stages. Greedy decoding needs neither.

    Args:
        keys: (user, window) of each prompt; by default its position.
        lists: constrains every response to a list of distinct open titles, drawn as the recipe
            says but for ``max_new_tokens``: no list is cut. None: free text.
        batches: how many at once (``fitting_batches``).

    Raises:
        ModelError: a prompt has too few open titles; nothing has been generated then.
        OutOfMemoryError: the device cannot hold even one prompt.
    """
    if keys is None:
        keys = [(position, 0) for position in range(len(prompts))]
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]
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

    def answered(batch: Sequence[int]) -> list[list[Sample]]:
        constraint = None
        if lists is not None:
            constraint = CatalogueConstraint(grammar, [starts[i] for i in batch])
        with precision(model):
            return sample_tokens(
                model,
                [asked[i] for i in batch],
                [streams[i] for i in batch],
                decoding,
                stops=stops,
                pad=tokenizer.pad_token_id,
                constraint=constraint,
            )

    responses: dict[int, Response] = {}
    batches = batches or fitting_batches(model, recipe, what, progress)
    for batch, answers in _batches(asked, batches, answered, what, progress):
        for index, (answer,) in zip(batch, answers, strict=True):
            responses[index] = Response(
                text=tokenizer.decode(answer.tokens, skip_special_tokens=True),
                n_prompt_tokens=len(asked[index]),
                n_response_tokens=len(answer.tokens),
                finished=answer.stop is not None,
            )
    return [responses[i] for i in range(len(prompts))]


def ranked_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    recipe: GenerationRecipe,
    lists: Lists,
    *,
    exact: bool = False,
    what: str = "ranking",
    batches: FittingBatches | None = None,
    progress: Progress = silent,
) -> list[Response]:
    """Per prompt its k most probable open titles, written as an answer would be.

    Args:
        exact: a beam for every open title, for where few are; else the recipe's ``beams``.
        batches: how many at once (``fitting_batches``).

    Raises:
        ModelError: a prompt has too few open titles.
        OutOfMemoryError: the device cannot hold even one prompt.
    """
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]

    def ranked(batch: Sequence[int]) -> list[Ranking]:
        beams = recipe.beams
        if exact:
            beams = max(lists.tries.k, *(int(lists.open_titles[i].sum()) for i in batch))
        with precision(model):
            return rank_titles(
                model,
                [asked[i] for i in batch],
                [lists.names[i] for i in batch],
                [lists.open_titles[i] for i in batch],
                lists.tries,
                beams=beams,
                pad=tokenizer.pad_token_id,
            )

    responses: dict[int, Response] = {}
    batches = batches or fitting_batches(model, recipe, what, progress)
    for batch, rankings in _batches(asked, batches, ranked, what, progress):
        for index, ranking in zip(batch, rankings, strict=True):
            responses[index] = Response(
                text=render_completion([lists.tries.titles[title] for title in ranking.titles]),
                n_prompt_tokens=len(asked[index]),
                n_response_tokens=ranking.n_tokens,
                finished=True,
                log_probabilities=ranking.log_probabilities,
            )
    return [responses[i] for i in range(len(prompts))]


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


def _batches(
    asked: Sequence[Sequence[int]],
    batches: FittingBatches,
    run: Callable[[Sequence[int]], Found],
    what: str,
    progress: Progress,
) -> Iterator[tuple[Sequence[int], Found]]:
    """(positions of prompts of similar length, what ``run`` makes of them); progress is told after
    each batch."""
    order = sorted(range(len(asked)), key=lambda i: (len(asked[i]), i))
    started = time.monotonic()
    done = 0
    for batch, found in batches.map(order, run):
        yield batch, found
        done += len(batch)
        per_second = done / (time.monotonic() - started)
        progress(
            ProgressEvent(
                what=what,
                step=done,
                total=len(order),
                examples_per_second=per_second,
                seconds_left=(len(order) - done) / per_second,
            )
        )
