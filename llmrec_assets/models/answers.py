"""Prompts answered by one policy: the rows of a ``*_responses`` table.

What belongs here: which prompts, which weights, in which order. What does not: how text is
generated (``generation``) and how it is read (``ground``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from llmrec_assets.ground.recipes import HYBRID, GenerationRecipe
from llmrec_assets.ground.recommendations import WINDOW_KEY, evaluated_prompts, seen_sets
from llmrec_assets.ground.recommender import Candidates
from llmrec_assets.models.chat import prompt_ids
from llmrec_assets.models.constrained import require_films
from llmrec_assets.models.device import Device, peak_memory_gb, usable_dtype
from llmrec_assets.models.generation import (
    Answerer,
    Lists,
    answer_in_batches,
    fitting_batches,
    ranked_answers,
    sampled_answers,
)
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.packed import pack
from llmrec_assets.models.progress import Progress, silent
from llmrec_assets.models.trie import catalogue_tries


@dataclass(frozen=True)
class Answers:
    """Rows of ``schemas.RESPONSES`` and what the run found out. ``log_probabilities``: by row, of
    a ranking's titles; empty for the other decodings."""

    frame: pd.DataFrame
    facts: dict[str, Any]
    log_probabilities: tuple[tuple[float, ...], ...]


def answer_test_prompts(
    prompts: pd.DataFrame,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    base_dir: Path,
    adapters: Sequence[Path],
    recipe: GenerationRecipe,
    *,
    stage: str,
    prompts_version: str,
    answer_versions: Mapping[str, str],
    max_users: int | None,
    top_k: int,
    seed: int,
    device: Device,
    candidates: Candidates | None = None,
    progress: Progress = silent,
) -> Answers:
    """``answer_prompts`` of every test prompt, or of those of the first ``max_users`` test users by
    id.

    Args:
        prompts: rows of ``schemas.PROMPTS``; only ``split == "test"`` is asked.
        adapters: the stage's adapters in the order they are merged; the last one names the
            stage. None: the base model itself.
    """
    return answer_prompts(
        evaluated_prompts(prompts, max_users),
        ratings,
        movies,
        partial(load_policy, base_dir, adapters),
        recipe,
        stage=stage,
        checkpoint_version=[base_dir, *adapters][-1].name,
        prompts_version=prompts_version,
        answer_versions=answer_versions,
        top_k=top_k,
        seed=seed,
        device=device,
        candidates=candidates,
        progress=progress,
    )


def answer_prompts(
    prompts: pd.DataFrame,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    load: Callable[..., tuple[Any, Any]],
    recipe: GenerationRecipe,
    *,
    stage: str,
    checkpoint_version: str,
    prompts_version: str,
    answer_versions: Mapping[str, str],
    top_k: int,
    seed: int,
    device: Device,
    candidates: Candidates | None = None,
    progress: Progress = silent,
) -> Answers:
    """Answers every prompt, once by each of the recipe's ``rows``; it is computed once for all.

    All but ``free`` leave out every film rated by the window's cut-off, as a deployed catalogue
    filter would; the prompt is the same. The hybrid ranks all of a window's candidates, no beam
    left out.

    Args:
        prompts: rows of ``schemas.PROMPTS``, of whichever split.
        ratings: ``RATINGS``, and ``movies``: ``MOVIES``, for that filter and the titles.
        load: gives model and tokenizer for a ``dtype`` and a ``device`` (``loading.load_policy``).
        answer_versions: by decoding (``ground.answers.answer_versions``).
        top_k: titles of a list.
        candidates: what the hybrid ranks.

    Raises:
        ModelError: the tokenizer's lists cannot be constrained, or a window has too few films, or
            too few candidates; nothing has been generated then.
        ValueError: the recipe has the hybrid and there are no candidates.
    """
    if HYBRID in recipe.rows and candidates is None:
        raise ValueError(f"{HYBRID} answers need candidates")
    keys = list(zip(*(prompts[name].tolist() for name in WINDOW_KEY), strict=True))
    started = time.monotonic()
    model, tokenizer = load(dtype=usable_dtype(device, recipe.dtype), device=device.torch)
    pack(model)
    constrained = set(recipe.rows) - {"free"}
    tries = catalogue_tries(tokenizer, movies, top_k) if constrained else None
    seen = seen_sets(prompts, ratings, movies) if constrained else {}

    def lists(decoding: str) -> Lists:
        assert tries is not None
        among = candidates.films if candidates and decoding == HYBRID else None
        names = [f"user {user}, window {window}" for user, window in keys]
        opened = [
            tries.open_titles(seen[key], None if among is None else among.get(key, frozenset()))
            for key in keys
        ]
        for name, titles in zip(names, opened, strict=True):
            require_films(tries, name, titles)
        return Lists(tries, names, opened)

    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts["prompt"]]

    def answerer(decoding: str) -> Answerer:
        if decoding in ("ranked", HYBRID):
            exact = decoding == HYBRID
            return ranked_answers(model, tokenizer, asked, recipe, lists(decoding), exact=exact)
        constraint = None if decoding == "free" else lists(decoding)
        return sampled_answers(
            model, tokenizer, asked, recipe, seed=seed, keys=keys, lists=constraint
        )

    answerers = {decoding: answerer(decoding) for decoding in recipe.rows}
    batches = fitting_batches(model, recipe, f"{stage} responses", progress)
    answers, seconds = answer_in_batches(model, tokenizer, asked, answerers, batches)
    n_prompts = max(len(asked), 1)

    frames: list[pd.DataFrame] = []
    scores: list[tuple[float, ...]] = []
    costs = {f"{name}_seconds_per_prompt": round(s / n_prompts, 3) for name, s in seconds.items()}
    for decoding, responses in answers.items():
        frame = prompts[WINDOW_KEY].reset_index(drop=True)
        frame["stage"] = stage
        frame["decoding"] = decoding
        frame["response"] = [r.text for r in responses]
        frame["n_prompt_tokens"] = [r.n_prompt_tokens for r in responses]
        frame["n_response_tokens"] = [r.n_response_tokens for r in responses]
        frame["finished"] = [r.finished for r in responses]
        frame["checkpoint_version"] = checkpoint_version
        frame["prompts_version"] = prompts_version
        frame["answer_version"] = answer_versions[decoding]
        frames.append(frame)
        scores += [r.log_probabilities for r in responses]
        n_tokens = int(frame["n_response_tokens"].sum())
        costs |= {
            f"{decoding}_tokens_per_prompt": round(n_tokens / n_prompts, 1),
            f"{decoding}_share_finished": float(frame["finished"].mean()) if len(frame) else 0.0,
        }
    frame = pd.concat(frames, ignore_index=True)
    return Answers(
        frame,
        {
            "seconds": round(time.monotonic() - started, 1),
            "mean_prompt_tokens": float(frame["n_prompt_tokens"].mean()) if len(frame) else 0.0,
            **costs,
            **({"prompts_at_once": batches.size} if batches.halved else {}),
            "peak_memory_gb": round(peak_memory_gb(device), 2),
            "device": device.name,
        },
        tuple(scores),
    )
