"""Direct preference optimisation of the SFT policy (paper §3.4; Rafailov et al., 2023).

What belongs here: the DPO loss and one linear function from pairs to an adapter directory. What
does not: pairs and their token ids (``pairs``), publishing and the device's queue
(``orchestration``).

The paper prints the objective without the reference policy's log-probabilities. Without them β
scales nothing that is anchored anywhere and the policy may drift as far as it likes; ours is
equation 7 of Rafailov et al., with the merged SFT policy as the reference.

Killed at any moment, the next call with the same ``work_dir`` resumes from the last complete
trainer checkpoint; on CPU in fp32 the result equals an undisturbed run's bit for bit. Where the
device runs out of memory, it goes on from there with smaller micro batches (``memory``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from llmrec_assets.ground.recipes import DpoRecipe
from llmrec_assets.models.device import Device, usable_dtype
from llmrec_assets.models.fast_layers import chosen_log_probs, speed_up
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.pairs import (
    EqualPairs,
    SplitPairs,
    TokenizedPair,
    require_fit,
    sequence_lengths,
    split_pairs,
    tokenize_pairs,
    train_on_pairs,
    trainer_settings,
    training_facts,
)
from llmrec_assets.models.progress import Progress, ProgressEvent, silent
from llmrec_assets.models.shared_prompts import (
    CHOSEN,
    REJECTED,
    PairCollator,
    by_pair,
    is_fit,
    model_inputs,
    predicted_from,
)
from llmrec_assets.models.training import (
    ReportProgress,
    last_complete_checkpoint,
    lora_config,
    save_adapter,
)

#: The reference's log-probabilities in an example, as TRL names them.
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def answer_log_probs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of (chosen, rejected) given the prompt, summed over tokens, [pairs, 2].

    Args:
        batch: as ``PairCollator`` makes it. Logits are computed only where they predict an answer.
    """
    parts = batch["parts"]
    answers = (parts == CHOSEN) | (parts == REJECTED)
    rows, places = answers.nonzero(as_tuple=True)
    sources = predicted_from(parts)[rows, places]
    keep = sources.unique()  # sorted
    logits = model(**model_inputs(batch), logits_to_keep=keep).logits
    found = chosen_log_probs(
        logits[rows, torch.searchsorted(keep, sources)], batch["input_ids"][rows, places], 1.0
    )
    log_probs = found.new_zeros(parts.shape).index_put((rows, places), found)
    # summed row by row, in one order: a resumed training has to end with the same bits
    sums = [(log_probs * (parts == part)).sum(dim=1) for part in (CHOSEN, REJECTED)]
    return by_pair(torch.stack(sums, dim=1), parts)


class _PairTrainer(EqualPairs, DPOTrainer):
    """``DPOTrainer`` on token ids of our own; a pair's prompt is computed once.

    TRL would render the chat once more and add its own end of text. Its loss computes the prompt
    once an answer, projects the prompt's positions too where there is no Triton, and runs the
    reference in every epoch.
    """

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """-log σ(β (log π/π_ref of chosen - of rejected)), eq. 7; mean over pairs."""
        chosen, rejected = answer_log_probs(model, inputs).unbind(dim=1)
        margins = self.beta * (
            (chosen - inputs[_REFERENCE[0]]) - (rejected - inputs[_REFERENCE[1]])
        )
        training = self.model.training
        logged = self._metrics["train" if training else "eval"]
        logged["rewards/margins"].append(margins.mean().item())
        logged["rewards/accuracies"].append((margins > 0).float().mean().item())
        loss = -torch.nn.functional.logsigmoid(margins).mean()
        if training:
            loss = self.weighted(loss, inputs)
        return (loss, None) if return_outputs else loss


def reference_log_probs(
    model: Any,
    examples: Sequence[TokenizedPair],
    collator: PairCollator,
    *,
    batch_size: int,
    dtype: torch.dtype,
    device: Device,
    progress: Progress = silent,
) -> torch.Tensor:
    """Log-probabilities of (chosen, rejected) under ``model``, [n, 2] in float32.

    Batches have the trainer's size and precision: with one pair a batch the first loss of the
    training is ln 2 to the last bit.
    """
    started = time.monotonic()
    found = torch.empty(len(examples), 2)
    for start in range(0, len(examples), batch_size):
        batch = collator(examples[start : start + batch_size])
        inputs = {name: tensor.to(device.torch) for name, tensor in batch.items()}
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            summed = answer_log_probs(model, inputs)
        done = min(start + batch_size, len(examples))
        found[start:done] = summed.float().cpu()
        per_second = done / max(time.monotonic() - started, 1e-9)
        progress(
            ProgressEvent(
                what="DPO reference",
                step=done,
                total=len(examples),
                examples_per_second=per_second,
                seconds_left=(len(examples) - done) / per_second,
            )
        )
    return found


def _dataset(examples: Sequence[TokenizedPair], reference: torch.Tensor) -> Dataset:
    return Dataset.from_list(
        [
            {**example, **dict(zip(_REFERENCE, log_probs, strict=True))}
            for example, log_probs in zip(examples, reference.tolist(), strict=True)
        ]
    )


def train_dpo_on_pairs(
    base_dir: Path,
    sft_adapter: Path,
    prompts: pd.DataFrame,
    pairs: pd.DataFrame,
    recipe: DpoRecipe,
    *,
    seed: int,
    work_dir: Path,
    device: Device,
    progress: Progress = silent,
) -> tuple[Path, dict[str, Any]]:
    """Trains a fresh adapter on the merged SFT policy; returns its directory and JSON facts.

    The reference is that policy with the adapter off. It never changes, so its log-probabilities
    are computed once, before there is an adapter, and kept in ``work_dir``.

    Args:
        base_dir: a base model as ``base.prepare_base_model`` writes it.
        sft_adapter: adapter directory of SFT.
        prompts: ``schemas.PROMPTS``.
        pairs: ``schemas.PREFERENCE_PAIRS``; split 'train' trains, 'validation' validates.
        work_dir: the trainer's own state lives here; name it by the version to be published.

    Raises:
        DataError: a pair's user is not in the pair's split, or no pair trains.
        RecipeError: an example does not fit ``recipe.max_length``.
        OutOfMemoryError: the device cannot hold even one pair.
    """
    split = split_pairs(prompts, pairs)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    train, validation = (
        tokenize_pairs(tokenizer, rows) for rows in (split.train, split.validation)
    )
    lengths = sequence_lengths([*train, *validation])
    require_fit(lengths, recipe.max_length, "dpo")

    attempt = partial(
        _train,
        base_dir,
        sft_adapter,
        split,
        train,
        validation,
        seed=seed,
        work_dir=work_dir,
        device=device,
        progress=progress,
    )
    return train_on_pairs(
        attempt,
        recipe,
        section="dpo",
        what="DPO",
        longest=max(lengths),
        work_dir=work_dir,
        device=device,
        progress=progress,
    )


def _train(
    base_dir: Path,
    sft_adapter: Path,
    split: SplitPairs,
    train: list[TokenizedPair],
    validation: list[TokenizedPair],
    recipe: DpoRecipe,
    *,
    seed: int,
    work_dir: Path,
    device: Device,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """One try, with micro batches as ``recipe`` says."""
    started = time.monotonic()
    dtype = usable_dtype(device, recipe.dtype)
    model, tokenizer = load_policy(base_dir, [sft_adapter], dtype=dtype, device=device.torch)
    speed_up(model)  # the reference, too: it has to round as the training does
    resume_from = last_complete_checkpoint(work_dir)

    pad, shared = tokenizer.pad_token_id or 0, is_fit(model)
    kept = work_dir / "reference.safetensors"
    reference = load_file(kept) if kept.exists() else {}
    size, layout = torch.tensor(recipe.micro_batch_size), torch.tensor(1 + shared)
    # In batches of the training's own size. What it began with, it goes on with; but the numbers
    # have to round as the training does now (before there were layouts: in rows apart, unsped).
    began = reference.get("layout") == layout and (
        resume_from is not None or reference.get("micro_batch_size", size) == size
    )
    if not began:
        reference = {
            name: reference_log_probs(
                model,
                examples,
                PairCollator(pad, shared),
                batch_size=batch_size,
                dtype=dtype,
                device=device,
                progress=progress,
            )
            for name, examples, batch_size in (
                ("train", train, recipe.micro_batch_size),
                ("validation", validation, 1),
            )
        } | {"micro_batch_size": size, "layout": layout}
        save_file(reference, kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)

    config = DPOConfig(
        **trainer_settings(recipe, dtype, seed=seed, work_dir=work_dir, device=device),
        beta=recipe.beta,
        per_device_eval_batch_size=1,  # a mean over batches is then one over pairs
    )
    # Only the leased card: the trainer would spread over all it sees.
    config._n_gpu = min(config.n_gpu, 1)
    trainer = _PairTrainer(
        model=model,
        args=config,
        data_collator=PairCollator(pad, shared, _REFERENCE),
        train_dataset=_dataset(train, reference["train"]),
        eval_dataset=_dataset(validation, reference["validation"]) if validation else None,
        processing_class=tokenizer,
        peft_config=lora_config(recipe.lora, "CAUSAL_LM"),
        callbacks=[ReportProgress("DPO", progress, recipe.batch_size)],
    )
    speed_up(trainer.model)  # the adapter's layers
    trainer.remove_callback(PrinterCallback)  # prints every log line when tqdm is off
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    adapter_dir = save_adapter(trainer.model, work_dir / "adapter", base_dir.name)

    measured = trainer.evaluate() if validation else None
    facts = training_facts(
        trainer,
        split,
        train,
        curves={
            "losses": "loss",
            "margins": "rewards/margins",
            "accuracies": "rewards/accuracies",
        },
        resume_from=resume_from,
        started=started,
        device=device,
    )
    facts["beta"] = recipe.beta
    facts["validation"] = measured and {
        "pairs": len(validation),
        "users": int(split.validation["user_id"].nunique()),
        "loss": measured["eval_loss"],
        "accuracy": measured["eval_rewards/accuracies"],
        "margin": measured["eval_rewards/margins"],
    }
    return adapter_dir, facts
