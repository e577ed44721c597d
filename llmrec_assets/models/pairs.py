"""Preference pairs as the two trainings that read them need them: DPO and the reward model.

What belongs here: which pairs may train, their token ids, trainer settings and facts both share.
What does not: a loss (``dpo``, ``reward``), how pairs are made (``ground``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

from llmrec_assets.ground.errors import DataError, RecipeError
from llmrec_assets.ground.recipes import PairTrainingRecipe
from llmrec_assets.models.chat import completion_ids, prompt_ids
from llmrec_assets.models.device import Device, peak_memory_gb
from llmrec_assets.models.memory import train_in_fitting_batches
from llmrec_assets.models.progress import Progress
from llmrec_assets.models.training import library_versions, optimizer_name, steps_kept

#: One pair: ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
TokenizedPair = dict[str, list[int]]


@dataclass(frozen=True)
class SplitPairs:
    """Pairs by split, each row with its ``prompt``, sorted by user, window and pair."""

    train: pd.DataFrame
    validation: pd.DataFrame


def split_pairs(prompts: pd.DataFrame, pairs: pd.DataFrame) -> SplitPairs:
    """Joins ``schemas.PREFERENCE_PAIRS`` to ``schemas.PROMPTS`` and refuses pairs out of place.

    Raises:
        DataError: no pair trains; a pair's user is not in the pair's split, in every one of the
            user's prompts; or a pair's window has no prompt.
    """
    user_splits = prompts.groupby("user_id")["split"].agg(set)
    for user, split in pairs[["user_id", "split"]].drop_duplicates().itertuples(index=False):
        found = user_splits.get(user, set())
        if split not in ("train", "validation") or found != {split}:
            raise DataError(
                f"preference_pairs: user {user} has a pair in split {split!r}, but is in "
                f"{' and '.join(map(repr, sorted(found))) or 'no split'} of prompts; only training "
                "users train and validation users validate: make the pairs from these prompts anew"
            )
    key = ["user_id", "window_index"]
    rows = pairs.merge(prompts[[*key, "prompt"]], on=key, how="left", validate="many_to_one")
    lost = rows[rows["prompt"].isna()]
    if len(lost):
        raise DataError(
            f"preference_pairs: user {lost['user_id'].iloc[0]} has a pair for window "
            f"{lost['window_index'].iloc[0]}, which prompts lacks: make the pairs from these "
            "prompts anew"
        )
    rows = rows.sort_values([*key, "pair"], ignore_index=True)
    train, validation = (rows[rows["split"] == split] for split in ("train", "validation"))
    if train.empty:
        raise DataError(
            "no preference pair of a training user to train on: raise sampling.n or "
            "sampling.temperature, or set preferences.ground_truth_pairs in the recipe"
        )
    return SplitPairs(train, validation)


def tokenize_pairs(tokenizer: Any, rows: pd.DataFrame) -> list[TokenizedPair]:
    """Token ids per row, rendered as in SFT and sampling; answers end with the end of turn."""
    return [
        {
            "prompt_ids": prompt_ids(tokenizer, prompt),
            "chosen_ids": completion_ids(tokenizer, prompt, chosen),
            "rejected_ids": completion_ids(tokenizer, prompt, rejected),
        }
        for prompt, chosen, rejected in zip(
            rows["prompt"], rows["chosen"], rows["rejected"], strict=True
        )
    ]


def sequence_lengths(examples: Sequence[TokenizedPair]) -> list[int]:
    """Tokens of every prompt with each of its two answers, [2 n]."""
    return [
        len(example["prompt_ids"]) + len(example[answer])
        for example in examples
        for answer in ("chosen_ids", "rejected_ids")
    ]


def require_fit(lengths: Sequence[int], max_length: int, section: str) -> None:
    """Refuses examples that do not fit.

    Raises:
        RecipeError: a length is above ``max_length``. Cutting the example would leave an answer
            without its end, so nothing is cut.
    """
    longest = max(lengths, default=0)
    if longest > max_length:
        raise RecipeError(
            f"{section}.max_length is {max_length}, but the longest example has {longest} tokens: "
            f"set it to at least {longest}, or use a shorter prompt template"
        )


class EqualPairs:
    """For a trainer whose loss is a mean over pairs: every pair of an optimizer step counts the
    same.

    The trainer weighs micro batches alike, also an epoch's last one, which may be shorter than
    the others of its step: the loss would depend on the micro batch size.
    """

    _pairs_each = 0.0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, n_items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if batches:
            self._pairs_each = sum(len(b["input_ids"]) for b in batches) / len(batches)
        return batches, n_items

    def weighted(self, loss: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """A micro batch's mean loss by its share of the step's pairs; 1 where all are alike."""
        pairs = len(inputs["input_ids"])
        return loss if pairs == self._pairs_each else loss * (pairs / self._pairs_each)


PairRecipe = TypeVar("PairRecipe", bound=PairTrainingRecipe)


def train_on_pairs(
    train: Callable[[PairRecipe], tuple[Path, dict[str, Any]]],
    recipe: PairRecipe,
    *,
    section: str,
    what: str,
    longest: int,
    work_dir: Path,
    device: Device,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """``train`` with the micro batch size that fits (``memory``); adapter directory and facts.

    Args:
        train: one try, with micro batches as its recipe says.
        section: the recipe's.
        longest: tokens of the longest example.
    """

    def attempt(size: int) -> tuple[Path, dict[str, Any]]:
        return train(recipe.model_copy(update={"micro_batch_size": size}))

    (adapter_dir, facts), memory = train_in_fitting_batches(
        attempt,
        what=what,
        micro_batch_size=recipe.micro_batch_size,
        batch_size=recipe.batch_size,
        work_dir=work_dir,
        stands_at=lambda: steps_kept(work_dir),
        device=device,
        remedy=f"{section}.gradient_checkpointing: true; a shorter prompts.template and a smaller "
        f"{section}.max_length (the longest example has {longest} tokens)",
        progress=progress,
    )
    return adapter_dir, {**facts, **memory}


def trainer_settings(
    recipe: PairTrainingRecipe, dtype: torch.dtype, *, seed: int, work_dir: Path, device: Device
) -> dict[str, Any]:
    """Arguments of TRL's ``DPOConfig`` and ``RewardConfig``; their defaults differ from ours."""
    return {
        "output_dir": str(work_dir),
        "per_device_train_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.batch_size // recipe.micro_batch_size,
        "num_train_epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler,
        "warmup_steps": recipe.warmup_ratio,  # below 1: a share of all steps
        "weight_decay": recipe.weight_decay,
        "optim": optimizer_name(device),
        "max_length": None,  # checked before; nothing is cut
        "disable_dropout": False,  # TRL's default would undo the adapter's dropout
        # Not grouped by length: that sampler draws from the global generator, which a resume in
        # the middle of a later epoch has not restored yet.
        "train_sampling_strategy": "random",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "save_total_limit": 2,
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
    }


def training_facts(
    trainer: Any,
    pairs: SplitPairs,
    examples: Sequence[TokenizedPair],
    *,
    curves: dict[str, str],
    resume_from: Path | None,
    started: float,
    device: Device,
) -> dict[str, Any]:
    """What a finished training says of itself, as JSON values.

    Args:
        examples: the training pairs, tokenized.
        curves: name in the facts → the trainer's own name, as it logs it every step.
        started: ``time.monotonic()`` at the start.
    """
    lengths = sequence_lengths(examples)
    seconds = time.monotonic() - started
    resumed_at = int(resume_from.name.rsplit("-", 1)[1]) if resume_from else 0
    trained_share = 1 - resumed_at / max(trainer.state.max_steps, 1)
    computed = sum(len(ids) for example in examples for ids in example.values())  # prompts once
    n_tokens = computed * trainer.args.num_train_epochs * trained_share
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "train_pairs": len(pairs.train),
        "validation_pairs": len(pairs.validation),
        "train_prompts": len(pairs.train[["user_id", "window_index"]].drop_duplicates()),
        "steps": trainer.state.global_step,
        "resumed_at": resumed_at,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(n_tokens / seconds, 1),
        "longest_example": max(lengths),
        "trainable_parameters": sum(
            p.numel() for p in trainer.model.parameters() if p.requires_grad
        ),
        "peak_memory_gb": round(peak_memory_gb(device), 2),
        "device": device.name,
        "threads": torch.get_num_threads(),
        "libraries": library_versions(),
        "trained_user_ids": sorted(set(pairs.train["user_id"].tolist())),
        "curves": {
            ours: [(entry["step"], entry[theirs]) for entry in steps]
            for ours, theirs in curves.items()
        },
    }
