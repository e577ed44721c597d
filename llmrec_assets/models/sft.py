"""Supervised fine-tuning with LoRA on the ground truth of the training windows (paper §3.3, §4).

What belongs here: one linear function from prompts to an adapter directory. What does not: the
base model's origin (``base``), rendering (``chat``), publishing and the device's queue
(``orchestration``).

Killed at any moment, the next call with the same ``work_dir`` resumes from the last complete
trainer checkpoint; on CPU in fp32 the result equals an undisturbed run's bit for bit. Where the
device runs out of memory, it goes on from there with smaller micro batches (``memory``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from llmrec_assets.ground.errors import DataError, RecipeError
from llmrec_assets.ground.recipes import SftRecipe
from llmrec_assets.models.chat import completion_ids, prompt_ids
from llmrec_assets.models.device import Device, peak_memory_gb, usable_dtype
from llmrec_assets.models.fast_layers import chosen_log_probs, last_positions, speed_up
from llmrec_assets.models.memory import train_in_fitting_batches
from llmrec_assets.models.progress import Progress, silent
from llmrec_assets.models.training import (
    ReportProgress,
    last_complete_checkpoint,
    library_versions,
    lora_config,
    optimizer_name,
    save_adapter,
    steps_kept,
)
from llmrec_assets.models.unpadded import positions, rows_of


@dataclass(frozen=True)
class SftResult:
    """What a training left behind. ``losses`` are (step, loss); ``resumed_at`` is 0 for a run that
    started afresh; ``memory``: the facts of ``memory.train_in_fitting_batches``."""

    adapter_dir: Path
    losses: list[tuple[int, float]]
    n_examples: int
    n_steps: int
    resumed_at: int
    seconds: float
    tokens_per_second: float
    longest_example: int
    peak_memory_gb: float
    trainable_parameters: int
    memory: dict[str, Any] = field(default_factory=dict)


def tokenize_examples(
    tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], max_length: int
) -> list[dict[str, list[int]]]:
    """Token ids and labels per example; labels of the prompt are -100 (completion-only loss).

    Raises:
        RecipeError: an example is longer than ``max_length`` tokens. Cutting it would train a
            completion without its end, so nothing is cut.
    """
    examples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked = prompt_ids(tokenizer, prompt)
        answer = completion_ids(tokenizer, prompt, completion)
        examples.append({"input_ids": asked + answer, "labels": [-100] * len(asked) + answer})
    longest = max((len(e["input_ids"]) for e in examples), default=0)
    if longest > max_length:
        raise RecipeError(
            f"sft.max_length is {max_length}, but the longest example has {longest} tokens: "
            f"set it to at least {longest}, or use a shorter prompt template"
        )
    return examples


def unpadded_batch(examples: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """One row of some examples, without padding (``unpadded``).

    ``input_ids`` and ``labels`` [1, N], ``position_ids`` [1, N], each example from 0, ``rows``, and
    ``answers``: the places whose output predicts a labelled token.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    labels = torch.tensor([label for example in examples for label in example["labels"]])
    return {
        "input_ids": torch.tensor([[i for example in examples for i in example["input_ids"]]]),
        "labels": labels[None],
        "position_ids": positions(lengths)[None],
        "rows": rows_of(lengths),
        # An example's first token is its prompt's: no label is predicted by another example.
        "answers": (labels != -100).nonzero()[:, 0] - 1,
    }


class _CompletionTrainer(SFTTrainer):
    """``SFTTrainer`` whose loss projects completion positions only, by plain PyTorch.

    TRL's own fused head does the same in tiles, as a Triton kernel on a GPU; where there is no
    Triton its tile-by-tile fallback takes two fifths of a step (SmolLM2, 2 cores, profiled).
    The loss is the same: the mean negative log-likelihood over labelled tokens.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        if "rows" in inputs:
            answers = inputs["answers"]
            outputs = model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                rows=inputs["rows"],
                use_cache=False,
                logits_to_keep=answers,
            )
            log_probs = chosen_log_probs(outputs.logits[0], labels[0, answers + 1], 1.0)
            n_labels = len(answers) if num_items_in_batch is None else num_items_in_batch
            loss = -log_probs.sum() / n_labels
            return (loss, outputs) if return_outputs else loss
        labelled = labels != -100
        # Position t is predicted from t - 1; rows are padded on the right.
        first = int(labelled.any(dim=0).nonzero()[0])
        # Rows are padded on the right: attention is causal, so no example sees padding, and without
        # a mask the fast attention serves.
        outputs = model(
            input_ids=inputs["input_ids"],
            use_cache=False,
            logits_to_keep=last_positions(labels.shape[1] - first + 1),
        )
        loss = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1).float(),
            labels[:, first:].flatten(),
            ignore_index=-100,
            reduction="sum",
        ) / (labelled.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def train_sft(
    base_dir: Path,
    prompts: Sequence[str],
    completions: Sequence[str],
    recipe: SftRecipe,
    *,
    seed: int,
    work_dir: Path,
    device: Device,
    progress: Progress = silent,
) -> SftResult:
    """Trains a LoRA adapter on prompt → completion; returns the adapter's directory and numbers.

    Args:
        base_dir: a base model as ``base.prepare_base_model`` writes it.
        prompts: user messages, [n].
        completions: answers to learn, [n].
        work_dir: the trainer's own state lives here; name it by the version to be published.

    Raises:
        DataError: there is no example.
        RecipeError: an example does not fit ``recipe.max_length``.
        OutOfMemoryError: the device cannot hold even one example.
    """
    if not prompts:
        raise DataError(
            "SFT has no training example: no training user has a valid window; "
            "lower windows.min_per_class or windows.min_ground_truth in the recipe"
        )
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    examples = tokenize_examples(tokenizer, prompts, completions, recipe.max_length)
    longest = max(len(e["input_ids"]) for e in examples)

    def train(micro_batch_size: int) -> SftResult:
        return _train(
            base_dir,
            tokenizer,
            examples,
            recipe.model_copy(update={"micro_batch_size": micro_batch_size}),
            seed=seed,
            work_dir=work_dir,
            device=device,
            progress=progress,
        )

    result, memory = train_in_fitting_batches(
        train,
        what="SFT",
        micro_batch_size=recipe.micro_batch_size,
        batch_size=recipe.batch_size,
        work_dir=work_dir,
        stands_at=lambda: steps_kept(work_dir),
        device=device,
        remedy="sft.gradient_checkpointing: true; a shorter prompts.template and a smaller "
        f"sft.max_length (the longest example has {longest} tokens)",
        progress=progress,
    )
    return replace(result, memory=memory)


def _train(
    base_dir: Path,
    tokenizer: Any,
    examples: list[dict[str, list[int]]],
    recipe: SftRecipe,
    *,
    seed: int,
    work_dir: Path,
    device: Device,
    progress: Progress,
) -> SftResult:
    """One try, with micro batches as ``recipe`` says."""
    started = time.monotonic()
    dtype = usable_dtype(device, recipe.dtype)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype)
    resume_from = last_complete_checkpoint(work_dir)

    config = SFTConfig(
        output_dir=str(work_dir),
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.batch_size // recipe.micro_batch_size,
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler,
        warmup_steps=recipe.warmup_ratio,  # below 1: a share of all steps
        weight_decay=recipe.weight_decay,
        optim=optimizer_name(device),
        max_length=None,  # checked above; nothing is cut
        packing=False,
        # Not grouped by length: that sampler draws from the global generator, which a resume in
        # the middle of a later epoch has not restored yet.
        train_sampling_strategy="random",
        gradient_checkpointing=recipe.gradient_checkpointing,
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
    )
    # Only the leased card: the trainer would spread over all it sees.
    config._n_gpu = min(config.n_gpu, 1)
    # On a GPU TRL's loss is fast by itself; ours is for rows without padding.
    ours = device.type != "cuda" or model.config.model_type == "llama"
    trainer = (_CompletionTrainer if ours else SFTTrainer)(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=lora_config(recipe.lora, "CAUSAL_LM"),
        callbacks=[ReportProgress("SFT", progress, recipe.batch_size)],
    )
    if speed_up(trainer.model, unpadded=True):
        trainer.data_collator = unpadded_batch
        trainer.train_dataset = examples  # an Arrow table makes lists anew for every batch
    trainer.remove_callback(PrinterCallback)  # prints every log line when tqdm is off
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)

    adapter_dir = save_adapter(trainer.model, work_dir / "adapter", base_dir.name)
    seconds = time.monotonic() - started
    resumed_at = int(resume_from.name.rsplit("-", 1)[1]) if resume_from else 0
    trained_share = 1 - resumed_at / max(trainer.state.max_steps, 1)
    n_tokens = sum(len(e["input_ids"]) for e in examples) * recipe.epochs * trained_share
    return SftResult(
        adapter_dir=adapter_dir,
        losses=[(h["step"], h["loss"]) for h in trainer.state.log_history if "loss" in h],
        n_examples=len(examples),
        n_steps=trainer.state.global_step,
        resumed_at=resumed_at,
        seconds=seconds,
        tokens_per_second=n_tokens / seconds,
        longest_example=max(len(e["input_ids"]) for e in examples),
        peak_memory_gb=peak_memory_gb(device),
        trainable_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    )


def train_sft_on_prompts(
    base_dir: Path,
    prompts: pd.DataFrame,
    recipe: SftRecipe,
    *,
    seed: int,
    work_dir: Path,
    device: Device,
    progress: Progress = silent,
) -> tuple[Path, dict[str, Any]]:
    """``train_sft`` on the training split of ``schemas.PROMPTS``: adapter directory and JSON facts.

    ``recipe.max_examples`` takes the first rows by user and window, whichever they are.
    """
    train = prompts[prompts["split"] == "train"].sort_values(["user_id", "window_index"])
    train = train.head(recipe.max_examples) if recipe.max_examples else train
    result = train_sft(
        base_dir,
        train["prompt"].tolist(),
        train["completion"].tolist(),
        recipe,
        seed=seed,
        work_dir=work_dir,
        device=device,
        progress=progress,
    )
    facts = {
        "examples": result.n_examples,
        "users": int(train["user_id"].nunique()),
        "steps": result.n_steps,
        "resumed_at": result.resumed_at,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "longest_example": result.longest_example,
        "trainable_parameters": result.trainable_parameters,
        "peak_memory_gb": round(result.peak_memory_gb, 2),
        "device": device.name,
        "threads": torch.get_num_threads(),
        "libraries": library_versions(),
        "trained_user_ids": sorted(set(train["user_id"].tolist())),
        "losses": result.losses,
        **result.memory,
    }
    return result.adapter_dir, facts
