"""A step of supervised fine-tuning: SmolLM2, Figure 2 prompts, LoRA of rank 16 and 256.

Peers: TRL's ``SFTTrainer`` with its defaults, and tuned (no gradient checkpointing, our micro
batch). Both get our token ids and labels, and the dtype that this machine computes in (TRL's
default, bfloat16, takes a hundred times as long on a CPU without instructions for it).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bench.frame import Bench, Figure, Peer, Row, Timer
from bench.language_models import (
    SEED,
    StepClock,
    compared,
    dtype_name,
    figure2_prompts,
    keep,
    kept,
    peak_flops,
    require_alike,
    settings,
    sft_flops,
    smollm2,
)
from llmrec_assets.ground.recipes import LoraRecipe, SftRecipe
from llmrec_assets.models.device import pick_device
from llmrec_assets.models.sft import tokenize_examples, train_sft
from llmrec_assets.models.training import lora_config

STEPS = 4  # the first is not counted
BATCH = 8  # as the paper
MICRO_BATCH = 4
MAX_LENGTH = 1024


def rows(bench: Bench) -> list[Row]:
    shared = bench.directory("sft", "shared")
    base, prompts = smollm2(shared), figure2_prompts(STEPS * BATCH)
    config = json.loads((base / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = tokenize_examples(
        tokenizer, prompts["prompt"].tolist(), prompts["completion"].tolist(), MAX_LENGTH
    )
    dtype = dtype_name()
    peak = peak_flops(getattr(torch, dtype))
    # The first step's examples are shuffled among them: a step's share is the mean.
    share = (STEPS - 1) / STEPS
    n_tokens = share * sum(len(e["input_ids"]) for e in examples)
    n_answer = share * sum(label != -100 for e in examples for label in e["labels"])

    def row(rank: int) -> Row:
        inputs = bench.directory("sft", f"r{rank}")
        lora = LoraRecipe(r=rank, alpha=2 * rank if rank < 256 else 128)
        (inputs / "settings.json").write_text(json.dumps({"lora": lora.model_dump()}))
        prompts.to_parquet(inputs / "prompts.parquet")
        if not (inputs / "base").exists():
            (inputs / "base").symlink_to(base.resolve(), target_is_directory=True)
        flops = share * sft_flops(config, lora, examples)

        def floor(ours: Figure) -> tuple[str, str]:
            used = flops / ours.seconds / peak
            return (
                f"{flops / peak:.3g} s (ours uses {used:.0%} of the peak); "
                f"{n_tokens / ours.seconds:,.0f} tokens/s",
                f"{flops / 1e12:.2f} · 10^12 operations (forward and backward to the activations "
                "of the base model, output layer on answer tokens only, adapters three times, "
                f"causal attention) at the {peak / 1e9:,.0f} · 10^9 a second of a square product "
                f"in {dtype}",
            )

        return compared(
            bench,
            "sft",
            f"SFT, {STEPS - 1} steps of {BATCH}, Figure 2 prompts, r {rank}",
            inputs,
            "ours",
            [
                Peer("TRL, defaults", "trl_default", goal=2, repeats=1),
                Peer("TRL, tuned", "trl_tuned", goal=1.2, repeats=2),
            ],
            check,
            f"{n_tokens:,.0f} tokens, {n_answer:,.0f} of them answers, {dtype}",
            floor,
        )

    return [row(16), row(256)]


def check(out: Mapping[str, Path]) -> str:
    found = {name: kept(path) for name, path in out.items()}
    # The first loss is of equal weights; after it the adapters' random starts differ.
    first = require_alike(
        "first losses", {name: facts["losses"][:1] for name, facts in found.items()}, 0.01
    )
    return f"{first}; " + require_alike(
        "all losses", {name: facts["losses"] for name, facts in found.items()}, 0.05
    )


def _settings(inputs: Path) -> dict[str, Any]:
    found = settings(inputs, batch=BATCH, micro_batch=MICRO_BATCH, warm_up=1)
    return found | {"lora": LoraRecipe(**found["lora"])}


def ours(inputs: Path, out: Path, timer: Timer) -> None:
    prompts, found = pd.read_parquet(inputs / "prompts.parquet"), _settings(inputs)
    shutil.rmtree(out / "work", ignore_errors=True)
    result = train_sft(
        inputs / "base",
        prompts["prompt"].tolist(),
        prompts["completion"].tolist(),
        SftRecipe(
            lora=found["lora"],
            learning_rate=1e-4,
            batch_size=found["batch"],
            micro_batch_size=found["micro_batch"],
            epochs=1,
            max_length=MAX_LENGTH,
            lr_scheduler="constant",
            save_steps=1000,
        ),
        seed=SEED,
        work_dir=out / "work",
        device=pick_device(),
        progress=StepClock(timer, found["warm_up"]),
    )
    keep(out, losses=[loss for _, loss in result.losses])


def trl_default(inputs: Path, out: Path, timer: Timer) -> None:
    _trl(inputs, out, timer, per_device_train_batch_size=_settings(inputs)["batch"])


def trl_tuned(inputs: Path, out: Path, timer: Timer) -> None:
    found = _settings(inputs)
    _trl(
        inputs,
        out,
        timer,
        per_device_train_batch_size=found["micro_batch"],
        gradient_accumulation_steps=found["batch"] // found["micro_batch"],
        gradient_checkpointing=False,
    )


def _trl(inputs: Path, out: Path, timer: Timer, **options: Any) -> None:
    prompts = pd.read_parquet(inputs / "prompts.parquet")
    tokenizer = AutoTokenizer.from_pretrained(inputs / "base")
    examples = tokenize_examples(
        tokenizer, prompts["prompt"].tolist(), prompts["completion"].tolist(), MAX_LENGTH
    )
    device, dtype, found = pick_device(), dtype_name(), _settings(inputs)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=getattr(torch, dtype))
    config = SFTConfig(
        output_dir=str(out / "work"),
        bf16=dtype == "bfloat16",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        max_length=MAX_LENGTH,
        use_cpu=device.type == "cpu",
        seed=SEED,
        data_seed=SEED,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        **options,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=lora_config(found["lora"], "CAUSAL_LM"),
        callbacks=[StepClock(timer, found["warm_up"])],
    )
    trainer.train()
    keep(out, losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
