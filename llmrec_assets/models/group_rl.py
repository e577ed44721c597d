"""TRL's GRPO and RLOO with the measured NDCG@k as reward, beside our PPO (beyond the paper).

What belongs here: one linear function from prompts to an adapter directory, for the methods that
compare several responses to one prompt and therefore need no value model. What does not: PPO
(``ppo``, paper §3.5), the score itself (``ground.scoring``), publishing (``orchestration``).

GRPO: Shao et al. (2024), arXiv:2402.03300. RLOO: Ahmadian et al. (2024), arXiv:2402.14740. Both
start from the merged SFT policy with a fresh adapter; the reference is that adapter switched off.
Killed at any moment, the next call with the same ``work_dir`` resumes after the last complete
batch; on CPU in fp32 the result equals an undisturbed run's bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from llmrec_assets.ground.errors import DataError, RecipeError
from llmrec_assets.ground.recipes import RlhfRecipe
from llmrec_assets.ground.scoring import ResponseScorer
from llmrec_assets.models.chat import TEMPLATE_VARIABLES, prompt_ids, stop_ids
from llmrec_assets.models.device import Device, peak_memory_gb, usable_dtype
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.progress import Progress, silent
from llmrec_assets.models.training import (
    ReportProgress,
    last_complete_checkpoint,
    library_versions,
    lora_config,
    save_adapter,
)


class _KlStop(TrainerCallback):
    """Ends the training once the policy is ``limit`` nats a response from the reference.

    Read at the first step of a batch: later ones log the KL of a policy that did not sample.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self.stopped = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # Mean nats a token times mean tokens a response: the sums cancel to nats a response.
        if logs.get("kl", 0.0) * logs.get("completions/mean_length", 0.0) > self._limit:
            self.stopped = True
            control.should_training_stop = True
            # No checkpoint of this batch: after a kill from here on it is run, and stops, again.
            control.should_save = False


def _curves(
    history: Sequence[dict[str, Any]], steps_per_batch: int
) -> dict[str, list[tuple[int, float]]]:
    """TRL's log by batch, under the names and in the units of ``ppo.train_ppo``."""
    # First of a batch: what is measured when it is sampled, and GRPO's KL before it is trained on.
    firsts: dict[int, dict[str, float]] = {}
    means: dict[int, dict[str, list[float]]] = {}
    for logs in history:
        batch = (logs["step"] - 1) // steps_per_batch + 1
        for name, value in logs.items():
            firsts.setdefault(batch, {}).setdefault(name, value)
            means.setdefault(batch, {}).setdefault(name, []).append(value)
    curves: dict[str, list[tuple[int, float]]] = {}
    for batch, first in firsts.items():
        length = first["completions/mean_length"]
        values = {
            "reward": first["score"],
            "entropy": first["entropy"],
            "response_length": length,
            "share_finished": 1 - first["completions/clipped_ratio"],
            "clip_fraction": float(np.mean(means[batch]["clip_ratio/region_mean"])),
            "loss": float(np.mean(means[batch]["loss"])),
        }
        if "kl" in first:
            values["kl"] = first["kl"] * length  # TRL's is a token's mean
        for name, value in values.items():
            curves.setdefault(name, []).append((batch, value))
    return curves


def prompt_order(n_prompts: int, n_wanted: int, seed: int) -> list[int]:
    """Positions of the prompts in the order of training: permutations, one after the other.

    TRL's own sampler starts its permutations anew at a resume in a later epoch; an order drawn
    here once makes the whole training one epoch.
    """
    draw = np.random.default_rng(seed)
    order: list[int] = []
    while len(order) < n_wanted:
        order += draw.permutation(n_prompts).tolist()
    return order[:n_wanted]


def train_group_rl(
    base_dir: Path,
    sft_adapter: Path,
    prompts: pd.DataFrame,
    recipe: RlhfRecipe,
    *,
    scorer: ResponseScorer,
    seed: int,
    work_dir: Path,
    device: Device,
    progress: Progress = silent,
) -> tuple[Path, dict[str, Any]]:
    """Trains a LoRA adapter on top of ``[sft]`` by GRPO or RLOO: adapter directory and JSON facts.

    A batch is ``batch_size`` responses, ``samples_per_prompt`` to each prompt, sampled from the
    prompt alone; ``epochs_per_batch`` x ``minibatches`` optimizer steps follow. The reward is
    NDCG@k, less ``missing_end_penalty`` where the response did not end by itself. ``clip`` bounds
    the ratio per token (GRPO) or per response (RLOO); ``kl_coefficient`` weighs the KL to the
    reference in the loss, per token (GRPO), or in the reward, per response (RLOO). With it at 0
    TRL computes no reference: no KL curve, and ``kl_stop`` cannot act. The value model's and GAE's
    recipe values, and ``kl_target``, have no counterpart here.

    Facts: ``curves`` hold (batch, value) by name. ``reward`` is the mean score without penalty,
    ``kl`` nats a response from the reference when the batch was sampled (GRPO: its first
    minibatch), ``entropy`` nats a token, ``clip_fraction`` of tokens (GRPO) or responses (RLOO).
    A training that ends by ``kl_stop`` says ``stopped_early`` and publishes the policy as it is.

    Args:
        prompts: ``schemas.PROMPTS``; the training split is used.
        scorer: NDCG@k of a response in its window.
        work_dir: the trainer's own state lives here; name it by the version to be published.

    Raises:
        DataError: there is no training prompt.
        RecipeError: ``recipe.method`` is PPO.
    """
    if recipe.method == "ppo":
        raise RecipeError("rlhf.method is ppo: train it by ppo.train_ppo, or set grpo or rloo")
    train = prompts[prompts["split"] == "train"].sort_values(["user_id", "window_index"])
    if train.empty:
        raise DataError(
            f"{recipe.method} has no training prompt: none of the {len(prompts)} prompts is of "
            "the training split, and users of other splits are never trained on; raise "
            "splits.train or lower windows.min_per_class in the recipe"
        )
    started = time.monotonic()
    n_wanted = recipe.batches * recipe.batch_size // recipe.samples_per_prompt
    rows = train.iloc[prompt_order(len(train), n_wanted, seed)]
    dtype = usable_dtype(device, recipe.dtype)
    model, tokenizer = load_policy(base_dir, [sft_adapter], dtype=dtype, device=device.torch)
    stops = stop_ids(tokenizer, model)
    model.generation_config.eos_token_id = stops  # where TRL looks up what ends a response
    work_dir.mkdir(parents=True, exist_ok=True)
    resume_from = last_complete_checkpoint(work_dir)

    def reward(
        completion_ids: Sequence[list[int]],
        user_id: Sequence[int],
        window_index: Sequence[int],
        log_metric: Callable[[str, float], None],
        **others: Any,
    ) -> list[float]:
        scores, penalties = [], []
        for ids, user, window in zip(completion_ids, user_id, window_index, strict=True):
            finished = ids[-1] in stops
            text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
            scores.append(scorer.score(user, window, text))
            penalties.append(0.0 if finished else recipe.missing_end_penalty)
        log_metric("score", float(np.mean(scores)))
        return [score - penalty for score, penalty in zip(scores, penalties, strict=True)]

    steps_per_batch = recipe.epochs_per_batch * recipe.minibatches
    methods: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "grpo": (
            GRPOTrainer,
            GRPOConfig,
            # TRL's default: the mean over all tokens of a minibatch. Shao et al.'s mean over each
            # response first makes a token of a long response count less.
            {"loss_type": "dapo", "scale_rewards": "group", "importance_sampling_level": "token"},
        ),
        "rloo": (RLOOTrainer, RLOOConfig, {"normalize_advantages": False}),
    }
    trainer_class, config_class, method_values = methods[recipe.method]
    config = config_class(
        output_dir=str(work_dir),
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.batch_size
        // (recipe.minibatches * recipe.micro_batch_size),
        generation_batch_size=recipe.batch_size,
        num_iterations=recipe.epochs_per_batch,
        num_generations=recipe.samples_per_prompt,
        num_train_epochs=1,
        shuffle_dataset=False,  # in the order of prompt_order
        max_completion_length=recipe.max_new_tokens,
        mask_truncated_completions=False,
        # An Instruct model's own generation config carries top_k and top_p: always pass all.
        temperature=recipe.temperature,
        top_k=0,
        top_p=1.0,
        min_p=None,
        repetition_penalty=1.0,
        use_vllm=False,
        chat_template_kwargs=TEMPLATE_VARIABLES,
        epsilon=recipe.clip,
        beta=recipe.kl_coefficient,
        disable_dropout=True,  # the base's own, if it has any
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch",
        gradient_checkpointing=recipe.gradient_checkpointing,
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        log_completions=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        # Between batches only: a resume inside one would sample it anew from a later policy.
        save_steps=steps_per_batch,
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        **method_values,
    )
    # Only the leased card: the trainer would spread over all it sees.
    config._n_gpu = min(config.n_gpu, 1)
    kl_stop = _KlStop(recipe.kl_stop)
    trainer = trainer_class(
        model=model,
        args=config,
        reward_funcs=[reward],
        # Messages, not rendered text: TRL tokenizes text with special tokens, which would put a
        # second BOS before a Llama prompt.
        train_dataset=Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": prompt}] for prompt in rows["prompt"]],
                "user_id": rows["user_id"].tolist(),
                "window_index": rows["window_index"].tolist(),
            }
        ),
        processing_class=tokenizer,
        peft_config=lora_config(recipe.lora, "CAUSAL_LM"),
        callbacks=[
            ReportProgress(
                recipe.method.upper(), progress, recipe.batch_size // recipe.minibatches
            ),
            kl_stop,
        ],
    )
    trainer.remove_callback(PrinterCallback)  # prints every log line when tqdm is off
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)

    adapter_dir = save_adapter(trainer.model, work_dir / "adapter", base_dir.name)
    batches = math.ceil(trainer.state.global_step / steps_per_batch)
    rows = rows.head(batches * recipe.batch_size // recipe.samples_per_prompt)
    resumed_step = int(resume_from.name.rsplit("-", 1)[1]) if resume_from else 0
    facts = {
        "method": recipe.method,
        "prompts": len(train),
        "users": int(rows["user_id"].nunique()),
        "episodes": batches * recipe.batch_size,
        "batches": batches,
        "steps": trainer.state.global_step,
        "stopped_early": kl_stop.stopped,
        "resumed_at": resumed_step // steps_per_batch,
        "seconds": round(time.monotonic() - started, 1),
        "longest_prompt": max(len(prompt_ids(tokenizer, prompt)) for prompt in train["prompt"]),
        "trainable_parameters": sum(
            p.numel() for p in trainer.model.parameters() if p.requires_grad
        ),
        "peak_memory_gb": round(peak_memory_gb(device), 2),
        "device": device.name,
        "threads": torch.get_num_threads(),
        "libraries": library_versions(),
        "trained_user_ids": sorted(set(rows["user_id"].tolist())),
        "curves": _curves(
            [logs for logs in trainer.state.log_history if "loss" in logs], steps_per_batch
        ),
    }
    return adapter_dir, facts
