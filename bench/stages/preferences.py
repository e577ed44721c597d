"""DPO and the reward model over the same pairs: SmolLM2, Figure 2 prompts, LoRA of rank 16.

Peer: TRL of the installed version, tuned: no gradient checkpointing, our batch, and for DPO the
reference's log-probabilities computed once beforehand instead of in every step. TRL's trainers
render the chat themselves, from prompt and answers as messages.

The whole training is timed, the reference and the first step included, loading and rendering left
out: the clock starts with the first forward pass of either side.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from bench.frame import Bench, Figure, Peer, Row, Timer
from bench.language_models import (
    SEED,
    body_parameters,
    compared,
    dtype_name,
    figure2_prompts,
    keep,
    kept,
    lora_parameters,
    peak_flops,
    require_alike,
    settings,
    smollm2,
)
from llmrec_assets.ground.recipes import DpoRecipe, EvaluationRecipe, LoraRecipe, RewardRecipe
from llmrec_assets.models.device import pick_device
from llmrec_assets.models.dpo import train_dpo_on_pairs
from llmrec_assets.models.pairs import tokenize_pairs
from llmrec_assets.models.reward import padding_id, train_reward_on_pairs
from llmrec_assets.models.training import lora_config, save_adapter

PAIRS = 16
LORA = LoraRecipe(r=16, alpha=16)
#: DPO's batch as the paper's; the reward model's as the recipes'.
BATCHES = {"dpo": 1, "reward": 4}
MAX_LENGTH = 1024
RATE = 1e-5


def rows(bench: Bench) -> list[Row]:
    inputs = bench.directory("preferences", "inputs")
    base = smollm2(inputs)
    untrained_adapter(base, inputs / "sft")
    prompts = figure2_prompts(PAIRS)
    prompts.to_parquet(inputs / "prompts.parquet")
    pairs = pairs_of(prompts)
    pairs.to_parquet(inputs / "pairs.parquet")
    config = json.loads((base / "config.json").read_text())
    examples = tokenize_pairs(
        AutoTokenizer.from_pretrained(base), pairs.assign(prompt=prompts["prompt"])
    )
    asked = sum(len(e["prompt_ids"]) for e in examples)
    answers = sum(len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in examples)
    dtype = dtype_name()
    peak = peak_flops(getattr(torch, dtype))

    def row(method: str, title: str) -> Row:
        flops = pair_flops(config, LORA, method, asked, answers)

        def floor(ours: Figure) -> tuple[str, str]:
            return (
                f"{flops / peak:.3g} s (ours uses {flops / ours.seconds / peak:.0%} of the peak)",
                f"{flops / 1e12:.2f} · 10^12 operations, a prompt's tokens counted once for both "
                f"answers, at {peak / 1e9:,.0f} · 10^9 a second in {dtype}",
            )

        return compared(
            bench,
            "preferences",
            title,
            inputs,
            f"ours_{method}",
            [Peer("TRL, tuned", f"trl_{method}", goal=1 / 0.8, repeats=3)],
            check_dpo if method == "dpo" else check_reward,
            f"{PAIRS} pairs, {asked:,} prompt and {answers:,} answer tokens, {dtype}",
            floor,
        )

    return [
        row("dpo", f"DPO, {PAIRS} pairs, batch 1, reference included"),
        row("reward", f"reward model, {PAIRS} pairs, batch 4"),
    ]


def pair_flops(
    config: Mapping[str, Any], lora: LoraRecipe, method: str, asked: int, answers: int
) -> float:
    """Floating-point operations over pairs of ``asked`` prompt and ``answers`` answer tokens.

    A prompt's tokens are counted once: its two answers could share them. DPO: reference and policy
    forward, policy backward to the activations. Without attention.
    """
    passes, per_answer = (6, 6) if method == "dpo" else (4, 0)
    return (
        passes * body_parameters(config) * (asked + answers)
        + 6 * lora_parameters(config, lora) * (asked + answers)
        + per_answer * config["hidden_size"] * config["vocab_size"] * answers
    )


def check_dpo(out: Mapping[str, Path]) -> str:
    found = {name: kept(path)["losses"] for name, path in out.items()}
    # ln 2 while the adapter is still nothing
    first = require_alike("first losses", {name: some[:1] for name, some in found.items()}, 0.01)
    means = {name: [sum(some) / len(some)] for name, some in found.items()}
    return f"{first}; {require_alike('mean losses', means, 0.05)}"


def check_reward(out: Mapping[str, Path]) -> str:
    found = {name: kept(path)["losses"] for name, path in out.items()}
    assert len({len(some) for some in found.values()}) == 1, found
    for name, some in found.items():
        # Each draws its own head, so a loss is near ln 2, not equal.
        assert all(0 < loss < 3 for loss in some), (name, some)
    told = ", ".join(f"{name} {sum(some) / len(some):.3f}" for name, some in found.items())
    return f"Mean losses from heads drawn apart: {told}"


def untrained_adapter(base: Path, directory: Path) -> None:
    """SFT's place: an adapter that changes nothing, so that TRL's base model is the same policy."""
    from peft import get_peft_model

    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    save_adapter(get_peft_model(model, lora_config(LORA, "CAUSAL_LM")), directory, base.name)


def pairs_of(prompts: pd.DataFrame) -> pd.DataFrame:
    """The ground truth preferred to the next user's; what they say is all the same here."""
    completions = prompts["completion"].tolist()
    pairs = prompts[["user_id", "window_index", "split"]].copy()
    pairs["pair"] = 0
    pairs["chosen"] = completions
    pairs["rejected"] = completions[1:] + completions[:1]
    return pairs


class _FirstForward:
    """Starts the clock with the first pass through the model's layers."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._begun: tuple[float, float] | None = None

    def watch(self) -> Any:
        from transformers import LlamaModel

        forward = LlamaModel.forward

        def timed(*args: Any, **options: Any) -> Any:
            self._begun = self._begun or (time.perf_counter(), time.process_time())
            return forward(*args, **options)

        return patch.object(LlamaModel, "forward", timed)

    def stop(self) -> None:
        assert self._begun is not None
        self._timer.seconds = time.perf_counter() - self._begun[0]
        self._timer.cpu_seconds = time.process_time() - self._begun[1]


def ours_dpo(inputs: Path, out: Path, timer: Timer) -> None:
    recipe = DpoRecipe(
        lora=LORA,
        learning_rate=RATE,
        batch_size=_batch("dpo", inputs),
        micro_batch_size=_batch("dpo", inputs),
        epochs=1,
        max_length=MAX_LENGTH,
        lr_scheduler="constant",
        save_steps=1000,
    )
    _ours(inputs, out, timer, train_dpo_on_pairs, recipe)


def ours_reward(inputs: Path, out: Path, timer: Timer) -> None:
    recipe = RewardRecipe(
        lora=LORA,
        learning_rate=RATE,
        batch_size=_batch("reward", inputs),
        micro_batch_size=_batch("reward", inputs),
        epochs=1,
        max_length=MAX_LENGTH,
        lr_scheduler="constant",
        save_steps=1000,
    )
    _ours(inputs, out, timer, train_reward_on_pairs, recipe, EvaluationRecipe())


def _ours(inputs: Path, out: Path, timer: Timer, train: Callable[..., Any], *recipes: Any) -> None:
    shutil.rmtree(out / "work", ignore_errors=True)
    clock = _FirstForward(timer)
    with clock.watch():
        _, facts = train(
            inputs / "base",
            inputs / "sft",
            pd.read_parquet(inputs / "prompts.parquet"),
            pd.read_parquet(inputs / "pairs.parquet"),
            *recipes,
            seed=SEED,
            work_dir=out / "work",
            device=pick_device(),
        )
        clock.stop()
    keep(out, losses=[loss for _, loss in facts["curves"]["losses"]])


def _messages(inputs: Path) -> Dataset:
    prompts = pd.read_parquet(inputs / "prompts.parquet")
    pairs = pd.read_parquet(inputs / "pairs.parquet")
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for prompt, chosen, rejected in zip(
                prompts["prompt"], pairs["chosen"], pairs["rejected"], strict=True
            )
        ]
    )


def _batch(method: str, inputs: Path) -> int:
    """Pairs of a step, all at once."""
    return int(settings(inputs, **BATCHES)[method])


def _settings(method: str, inputs: Path, out: Path) -> dict[str, Any]:
    device = pick_device()
    return {
        "output_dir": str(out / "work"),
        "per_device_train_batch_size": _batch(method, inputs),
        "gradient_checkpointing": False,
        "bf16": dtype_name() == "bfloat16",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "max_length": MAX_LENGTH,
        "use_cpu": device.type == "cpu",
        "seed": SEED,
        "data_seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
    }


def trl_dpo(inputs: Path, out: Path, timer: Timer) -> None:
    dtype = getattr(torch, dtype_name())
    clock = _FirstForward(timer)
    with clock.watch():
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=dtype),
            args=DPOConfig(**_settings("dpo", inputs, out), precompute_ref_log_probs=True),
            train_dataset=_messages(inputs),
            processing_class=AutoTokenizer.from_pretrained(inputs / "base"),
            peft_config=lora_config(LORA, "CAUSAL_LM"),
        )
        trainer.train()
        clock.stop()
    keep(out, losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def trl_reward(inputs: Path, out: Path, timer: Timer) -> None:
    dtype = getattr(torch, dtype_name())
    tokenizer = AutoTokenizer.from_pretrained(inputs / "base")
    # Its own pad token ends an answer; the classifier would read the score in the wrong place.
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_id(tokenizer))
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        inputs / "base", dtype=dtype, num_labels=1
    )
    clock = _FirstForward(timer)
    with clock.watch():
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(**_settings("reward", inputs, out)),
            train_dataset=_messages(inputs),
            processing_class=tokenizer,
            peft_config=lora_config(LORA, "SEQ_CLS"),
        )
        trainer.train()
        clock.stop()
    keep(out, losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
