"""The SFT policy's sampled responses: n distinct texts per training and validation prompt.

What belongs here: drawing again what repeats, and batches that are kept as they are made. What
does not: which prompts (``ground.sampled``), the token loop (``sampling``), scores and pairs
(``ground``).

Killed at any moment, the next call with the same ``work_dir`` goes on after the last batch
written, and ends with the same responses as an undisturbed run.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.recipes import SamplingRecipe
from llmrec_assets.ground.recommendations import WINDOW_KEY, typed
from llmrec_assets.ground.sampled import sampled_prompts
from llmrec_assets.ground.schemas import SAMPLED_RESPONSES
from llmrec_assets.models.chat import prompt_ids
from llmrec_assets.models.device import Device, peak_memory_gb, usable_dtype
from llmrec_assets.models.generators import Generator, open_generator
from llmrec_assets.models.loading import load_tokenizer
from llmrec_assets.models.memory import FittingBatches
from llmrec_assets.models.progress import Progress, ProgressEvent, silent
from llmrec_assets.models.sampling import Decoding, stream


def sample_responses(
    prompts: pd.DataFrame,
    base_dir: Path,
    adapters: Sequence[Path],
    recipe: SamplingRecipe,
    *,
    prompts_version: str,
    sampling_version: str,
    seed: int,
    work_dir: Path,
    device: Device,
    progress: Progress = silent,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Samples ``recipe.n`` distinct texts per prompt of ``sampled_prompts`` (paper §3.4).

    A text that the prompt already has is drawn again, up to ``recipe.max_draws`` draws in all, then
    left out. The noise is named by (seed, user, window, sample, draw, token position), so that in
    float32 ``prompts_per_batch`` changes nothing (``recipe.engine``: in vLLM, little).

    Args:
        prompts: rows of ``schemas.PROMPTS``.
        adapters: the SFT adapter; the last one, or else the base model, is the checkpoint.
        sampling_version: hash of all that determines the samples.
        work_dir: holds the batches made so far, one file each; name it by ``sampling_version``.

    Returns:
        Rows of ``schemas.SAMPLED_RESPONSES`` by (user, window, sample), and JSON facts; their
        ``seconds`` and ``tokens_per_second`` count batches of earlier attempts in.

    Raises:
        DataError: there is no prompt to sample.
        ModelError: the recipe's engine is not installed, or cannot start.
        OutOfMemoryError: the device cannot hold even one sample.
    """
    asked = sampled_prompts(prompts, recipe)
    if asked.empty:
        raise DataError(
            "there is no prompt to sample: no training or validation user has a valid window; "
            "lower windows.min_per_class or windows.min_ground_truth in the recipe"
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    files = _BatchFiles(work_dir, sampling_version)
    batches = _batches(asked, recipe.prompts_per_batch)
    finished = {number: files.read(number, keys) for number, (keys, _) in enumerate(batches)}
    missing = [number for number, batch in finished.items() if batch is None]
    rows = FittingBatches(
        what="sampled responses",
        item="sample",
        size=None,
        device=device.torch,
        remedy="a smaller sampling.max_new_tokens; a shorter prompts.template",
        progress=progress,
    )
    if missing:
        tokenizer = load_tokenizer(base_dir)
        tokens = [[prompt_ids(tokenizer, text) for text in texts] for _, texts in batches]
        with open_generator(
            recipe.engine,
            base_dir,
            adapters,
            dtype=usable_dtype(device, recipe.dtype),
            device=device.torch,
            rows=rows,
            longest=max(len(ids) for batch in tokens for ids in batch) + recipe.max_new_tokens,
            work_dir=work_dir,
        ) as generator:
            policy = _Policy(generator, tokenizer, recipe, seed)
            done = len(asked) - sum(len(tokens[number]) for number in missing)
            sampled_here, started = 0, time.monotonic()
            for number in missing:
                keys, _ = batches[number]
                batch = _sample_batch(policy, keys, tokens[number])
                finished[number] = files.write(number, batch)
                done, sampled_here = done + len(keys), sampled_here + len(keys)
                per_second = sampled_here / (time.monotonic() - started)
                progress(
                    ProgressEvent(
                        what="sampled responses",
                        step=done,
                        total=len(asked),
                        examples_per_second=per_second,
                        seconds_left=(len(asked) - done) / per_second,
                    )
                )

    whole = [finished[number] or {} for number in range(len(batches))]
    frame = pd.DataFrame([row for batch in whole for row in batch["responses"]])
    frame = frame.merge(asked[[*WINDOW_KEY, "split"]], on=WINDOW_KEY, validate="many_to_one")
    frame["checkpoint_version"] = [base_dir, *adapters][-1].name
    frame["prompts_version"] = prompts_version
    frame["sampling_version"] = sampling_version
    frame = typed(frame.sort_values([*WINDOW_KEY, "sample"], ignore_index=True), SAMPLED_RESPONSES)
    seconds = sum(batch["seconds"] for batch in whole)
    n_tokens = sum(batch["tokens"] for batch in whole)
    return frame, {
        "prompts": len(asked),
        "responses": len(frame),
        "left_out": len(asked) * recipe.n - len(frame),
        "redrawn": sum(batch["redrawn"] for batch in whole),
        "share_finished": float(frame["finished"].mean()),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(n_tokens / seconds, 1),
        "resumed_batches": len(batches) - len(missing),
        **({"samples_at_once": rows.size} if rows.halved else {}),
        # of this process: on a CPU vLLM has more
        "peak_memory_gb": round(peak_memory_gb(device), 2),
        "engine": recipe.engine,
        "device": device.name,
    }


def _batches(
    asked: pd.DataFrame, prompts_per_batch: int
) -> list[tuple[list[tuple[int, int]], list[str]]]:
    """(keys, prompts) of each batch. Prompts of similar length share one: padding costs compute."""
    lengths = asked["prompt"].str.len()
    ordered = asked.iloc[lengths.argsort(kind="stable")]
    keys = [(int(user), int(window)) for user, window in ordered[WINDOW_KEY].to_numpy()]
    texts = ordered["prompt"].tolist()
    return [
        (keys[start : start + prompts_per_batch], texts[start : start + prompts_per_batch])
        for start in range(0, len(keys), prompts_per_batch)
    ]


@dataclass(frozen=True)
class _Policy:
    """What all batches are sampled with."""

    generator: Generator
    tokenizer: Any
    recipe: SamplingRecipe
    seed: int


def _sample_batch(
    policy: _Policy, keys: list[tuple[int, int]], asked: list[list[int]]
) -> dict[str, Any]:
    """Samples one batch, prompts as token ids: its responses and what they cost."""
    recipe, tokenizer = policy.recipe, policy.tokenizer
    decoding = Decoding(
        max_new_tokens=recipe.max_new_tokens,
        temperature=recipe.temperature,
        top_k=recipe.top_k,
        top_p=recipe.top_p,
    )
    started = time.monotonic()
    wanted = [list(range(recipe.n)) for _ in keys]
    seen: list[set[str]] = [set() for _ in keys]
    responses = []
    n_tokens = redrawn = 0
    for draw in range(recipe.max_draws):
        again = [i for i, samples in enumerate(wanted) if samples]
        if not again:
            break
        redrawn += sum(len(wanted[i]) for i in again) if draw else 0
        answers = policy.generator.sample(
            [asked[i] for i in again],
            [
                [stream(policy.seed, "sample", *keys[i], sample, draw) for sample in wanted[i]]
                for i in again
            ],
            decoding,
        )
        for i, drawn in zip(again, answers, strict=True):
            repeats = []
            for sample, answer in zip(wanted[i], drawn, strict=True):
                n_tokens += len(answer.tokens)
                text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
                if text in seen[i]:
                    repeats.append(sample)
                    continue
                seen[i].add(text)
                responses.append(
                    {
                        "user_id": keys[i][0],
                        "window_index": keys[i][1],
                        "sample": sample,
                        "draw": draw,
                        "response": text,
                        "n_prompt_tokens": len(asked[i]),
                        "n_response_tokens": len(answer.tokens),
                        "finished": answer.stop is not None,
                    }
                )
            wanted[i] = repeats
    return {
        "keys": [list(key) for key in keys],
        "responses": responses,
        "redrawn": redrawn,
        "tokens": n_tokens,
        "seconds": time.monotonic() - started,
    }


@dataclass(frozen=True)
class _BatchFiles:
    """``batch-00007.json`` in ``directory``: a batch and its hash, whole or not there."""

    directory: Path
    sampling_version: str

    def read(self, number: int, keys: list[tuple[int, int]]) -> dict[str, Any] | None:
        """The batch, or None where the file is missing, damaged, or of other samples."""
        try:
            held = json.loads(self._path(number).read_bytes())
            batch = held["batch"]
            whole = held["sha256"] == self._hash(batch)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None
        return batch if whole and batch["keys"] == [list(key) for key in keys] else None

    def write(self, number: int, batch: dict[str, Any]) -> dict[str, Any]:
        """Writes the batch aside and renames it; returns it."""
        path = self._path(number)
        aside = path.with_suffix(".partial")
        with aside.open("w", encoding="utf-8") as file:
            json.dump({"sha256": self._hash(batch), "batch": batch}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        return batch

    def _path(self, number: int) -> Path:
        return self.directory / f"batch-{number:05d}.json"

    def _hash(self, batch: dict[str, Any]) -> str:
        text = json.dumps([self.sampling_version, batch], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
