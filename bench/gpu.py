"""The model stages on a GPU at the shape of Llama-3.2-1B: tokens/s and model FLOP utilisation.

    python -m bench.gpu --tokenizer DIR [--only sft,dpo] [--out gpu.json]

Weights are random: they cost what trained ones cost. The tokenizer is any base model's of ours, the
prompts are the embedded sample's by the paper's template. Everything runs in this process, ours and
the peer's one after the other, and a part that fails does not keep the others from running.

**Model FLOP utilisation**: the operations that the stage's arithmetic needs, over its time, over
the card's rate. Counted are products of the base model's weights, forward (2 a weight and token)
and backward to the activations (2; frozen weights have no gradient), of the adapters (6), of the
output layer where a token is predicted, and in SFT causal attention; elementwise work, recomputed
activations and padding are not. The rate is the datasheet's for dense bfloat16 and, beside it, what
a square product reaches here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.frame import Timer
from bench.language_models import (
    SEED,
    body_parameters,
    figure2_prompts,
    kept,
    lora_parameters,
    sft_flops,
)
from bench.stages import generation, preferences, sft
from llmrec_assets.ground.recipes import LoraRecipe, RlhfRecipe
from llmrec_assets.models import ppo
from llmrec_assets.models.chat import prompt_ids
from llmrec_assets.models.device import empty_device, pick_device
from llmrec_assets.models.sampling import Decoding, sample_tokens, stream
from llmrec_assets.models.sft import tokenize_examples

#: Dense bfloat16 operations a second by the datasheets, by what the card's name holds.
DATASHEET = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}


class Visit:
    """The inputs, the card's rates, and what was found."""

    def __init__(self, work: Path, tokenizer: Path, out: Path) -> None:
        self.work, self.out = work, out
        self.rows: list[dict[str, Any]] = []
        self.device = pick_device()
        self.base = work / "base"
        if not (self.base / "config.json").exists():
            torch.manual_seed(SEED)
            with torch.device("cuda"):
                model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B)).to(torch.bfloat16)
            model.save_pretrained(self.base)
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(self.base)
            del model
            empty_device(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.measured = _square_product()
        sheet = [rate for name, rate in DATASHEET.items() if name in self.device.name]
        self.sheet = sheet[0] if sheet else self.measured
        print(
            f"{self.device.name}, torch {torch.__version__}: {self.measured / 1e12:.0f} TFLOP/s in "
            f"a square bfloat16 product, {self.sheet / 1e12:.0f} by the datasheet; copies "
            f"{_copy_rate() / 1e12:.2f} TB/s",
            flush=True,
        )

    def inputs(self, name: str, prompts: pd.DataFrame, **settings: Any) -> Path:
        directory = self.work / name
        directory.mkdir(parents=True, exist_ok=True)
        prompts.to_parquet(directory / "prompts.parquet")
        (directory / "settings.json").write_text(json.dumps(settings))
        if not (directory / "base").exists():
            (directory / "base").symlink_to(self.base.resolve(), target_is_directory=True)
        return directory

    def run(
        self,
        what: str,
        side: Callable[[Path, Path, Timer], None],
        inputs: Path,
        flops: float,
        tokens: float,
    ) -> None:
        """Times one side and tells of it."""
        empty_device(self.device)
        torch.cuda.reset_peak_memory_stats()
        out, timer = inputs / "out", Timer()
        out.mkdir(exist_ok=True)
        started = time.perf_counter()
        # Ours does without (``device.without_cudnn_attention``); a peer has what it would have.
        torch.backends.cuda.enable_cudnn_sdp(": ours" not in what)
        try:
            side(inputs, out, timer)
        except Exception:
            traceback.print_exc()
            return
        finally:
            whole = time.perf_counter() - started
        facts = kept(out) if (out / "facts.json").exists() else {}
        row = {
            "what": what,
            "seconds": timer.seconds,
            "tokens_per_second": tokens / timer.seconds,
            "tflops": flops / timer.seconds / 1e12,
            "mfu": flops / timer.seconds / self.sheet,
            "of_measured": flops / timer.seconds / self.measured,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "whole_seconds": whole,
            "losses": facts.get("losses", [])[:8],
            **{name: facts[name] for name in ("phases",) if name in facts},
        }
        self.rows.append(row)
        losses = " ".join(f"{loss:.4f}" for loss in row["losses"][:3])
        print(
            f"{what}: {timer.seconds:.3f} s, {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['mfu']:.1%} of the datasheet, {row['of_measured']:.1%} of the product, "
            f"{row['peak_gb']:.1f} GB, {whole:.0f} s in all; losses {losses} "
            f"{row.get('phases', '')}",
            flush=True,
        )
        self.out.write_text(json.dumps(self.rows, indent=1))


def _square_product() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / _median_seconds(lambda: a @ b)


def _copy_rate() -> float:
    a, b = (torch.empty(2**32, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * 2**32 / _median_seconds(lambda: a.copy_(b))


def _median_seconds(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times[2:])[len(times[2:]) // 2]


def tiled(n: int) -> pd.DataFrame:
    """The sample's training prompts again and again, each a user of its own."""
    some = figure2_prompts(128)
    rows = pd.concat([some] * -(-n // len(some)), ignore_index=True).head(n)
    return rows.assign(user_id=range(1, n + 1))


# ---------------------------------------------------------------- SFT


def run_sft(
    visit: Visit, *, sides: str = "ours,trl", cases: str = "256x8,256x64,16x64,256x64x0"
) -> None:
    """Cases: rank x batch, with the paper's dropout unless a third number says another."""
    warm_up, steps = 3, 6
    for case in cases.split(","):
        rank, batch = map(int, case.split("x")[:2])
        dropout = float([*case.split("x"), "0.05"][2])
        prompts = tiled((warm_up + steps) * batch)
        lora = LoraRecipe(r=rank, alpha=128, dropout=dropout)
        inputs = visit.inputs(
            f"sft-{case}",
            prompts,
            lora=lora.model_dump(),
            batch=batch,
            micro_batch=batch,
            warm_up=warm_up,
        )
        examples = tokenize_examples(
            visit.tokenizer, prompts["prompt"].tolist(), prompts["completion"].tolist(), 1024
        )
        share = steps / (warm_up + steps)  # the order is drawn: a step's share is the mean
        flops = share * sft_flops(LLAMA_1B, lora, examples)
        tokens = share * sum(len(e["input_ids"]) for e in examples)
        known = {
            "ours": ("ours", sft.ours),
            "trl": ("TRL, tuned", sft.trl_tuned),
            "compiled": ("ours, whole layers compiled", _compiled),
            "profile": ("ours, profiled", _profiled),
        }
        for side in sides.split(","):
            name, run = known[side]
            what = f"SFT r {rank}, dropout {dropout:g}, batch {batch}: {name}"
            visit.run(what, run, inputs, flops, tokens)


def _compiled(inputs: Path, out: Path, timer: Timer) -> None:
    """Ours with every decoder layer compiled, instead of a few elementwise functions."""
    from llmrec_assets.models import fast_layers
    from llmrec_assets.models import sft as module

    kernels = (fast_layers._one_rotated, fast_layers._one_swiglu, fast_layers._one_swiglu_backward)
    kernels += (fast_layers._one_add_dropped,)

    def speed_up(model: Any, **options: Any) -> bool:
        found = fast_layers.speed_up(model, **options)
        for layer in model.get_base_model().model.layers:
            layer.compile(dynamic=True)
        return found

    kept_aside = [kernel._fused for kernel in kernels]
    try:
        for kernel in kernels:
            kernel._fused = None
        with patch.object(module, "speed_up", speed_up):
            sft.ours(inputs, out, timer)
    finally:
        for kernel, fused in zip(kernels, kept_aside, strict=True):
            kernel._fused = fused


def _profiled(inputs: Path, out: Path, timer: Timer) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        sft.ours(inputs, out, timer)
    table = profiler.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90
    )
    print("\n".join(line[:91] + line[-120:] for line in table.splitlines()), flush=True)


# ---------------------------------------------------------------- DPO and reward model


def run_preferences(visit: Visit, *, method: str, pairs: int = 96, batch: int = 8) -> None:
    prompts = tiled(pairs)
    inputs = visit.inputs("pairs", prompts, dpo=batch, reward=batch)
    some = preferences.pairs_of(prompts)
    some.to_parquet(inputs / "pairs.parquet")
    if not (inputs / "sft").exists():
        preferences.untrained_adapter(visit.base, inputs / "sft")
    examples = preferences.tokenize_pairs(visit.tokenizer, some.assign(prompt=prompts["prompt"]))
    asked = sum(len(e["prompt_ids"]) for e in examples)
    answers = sum(len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in examples)
    flops = preferences.pair_flops(LLAMA_1B, preferences.LORA, method, asked, answers)
    for side in ("ours", "trl"):
        run = getattr(preferences, f"{side}_{method}")
        name = "ours" if side == "ours" else "TRL, tuned"
        what = f"{method}, {pairs} pairs, batch {batch}, all steps: {name}"
        visit.run(what, run, inputs, flops, asked + answers)


# ---------------------------------------------------------------- PPO


def run_ppo(visit: Visit) -> None:
    recipe = RlhfRecipe(
        reward="ndcg",
        lora=LoraRecipe(r=16, alpha=16),
        batches=3,
        batch_size=64,
        micro_batch_size=16,
        epochs_per_batch=4,
        kl_target=1e9,
        kl_stop=1e9,
        max_new_tokens=64,
    )
    prompts = tiled(recipe.batches * recipe.batch_size).assign(split="train")
    inputs = visit.inputs("ppo", prompts)
    if not (inputs / "sft").exists():
        preferences.untrained_adapter(visit.base, inputs / "sft")
    lengths = [len(prompt_ids(visit.tokenizer, prompt)) for prompt in prompts["prompt"]]
    asked = sum(lengths) / len(lengths) * recipe.batch_size
    new = recipe.max_new_tokens * recipe.batch_size
    body, adapters = body_parameters(LLAMA_1B), lora_parameters(LLAMA_1B, recipe.lora)
    head = LLAMA_1B["hidden_size"] * LLAMA_1B["vocab_size"]
    sampling = 2 * (body + adapters) * (asked + new) + 2 * head * new
    scoring = (3 * 2 * body + 2 * 2 * adapters) * (asked + new) + 2 * 2 * head * new
    updating = (2 * 4 * body + 2 * 6 * adapters) * (asked + new) + 4 * head * new
    flops = sampling + scoring + recipe.epochs_per_batch * updating
    ends: list[float] = []

    def side(inputs: Path, out: Path, timer: Timer) -> None:
        shutil.rmtree(out / "work", ignore_errors=True)
        # Nothing ends a response before its length: -1 is no token.
        with patch.object(ppo, "stop_ids", lambda tokenizer, model: [-1]):
            _, facts = ppo.train_ppo(
                inputs / "base",
                inputs / "sft",
                prompts,
                recipe,
                reward_dir=None,
                scorer=_Nothing(),
                seed=SEED,
                work_dir=out / "work",
                device=visit.device,
                progress=lambda event: ends.append(time.perf_counter()),
            )
        timer.seconds = (ends[-1] - ends[0]) / (recipe.batches - 1)
        (out / "facts.json").write_text(
            json.dumps({"phases": facts["phase_seconds"], "losses": []})
        )

    what = f"PPO, a batch of {recipe.batch_size} episodes of {recipe.max_new_tokens} tokens: ours"
    visit.run(what, side, inputs, flops, asked + new)


class _Nothing:
    """A scorer that finds every answer worth the same."""

    def score(self, user_id: int, window_index: int, text: str) -> float:
        return 0.0

    def item_scores(self, user_id: int, window_index: int, text: str) -> list[tuple[int, float]]:
        return []


# ---------------------------------------------------------------- generation


def run_generation(visit: Visit, *, prompts_per_batch: int = 64) -> None:
    prompts = tiled(generation.PROMPTS)
    inputs = visit.inputs("generation", prompts)
    asked = generation.prompt_tokens(inputs)
    n_new = generation.PROMPTS * generation.SAMPLES * generation.TOKENS
    n_all = sum(map(len, asked)) + n_new
    flops = 2 * body_parameters(LLAMA_1B) * n_all
    flops += 2 * LLAMA_1B["hidden_size"] * LLAMA_1B["vocab_size"] * n_new

    def ours(inputs: Path, out: Path, timer: Timer) -> None:
        model = generation.load_model(inputs, "bfloat16")
        decoding = Decoding(generation.TOKENS, temperature=generation.TEMPERATURE)

        def sampled(prompts: list[list[int]], decoding: Decoding) -> None:
            streams = [
                [stream(SEED, i, j) for j in range(generation.SAMPLES)] for i in range(len(prompts))
            ]
            sample_tokens(model, prompts, streams, decoding, stops=[-1], pad=0)

        sampled(asked[:2], Decoding(4))
        torch.cuda.synchronize()
        with timer():
            for batch in generation.batches(asked, prompts_per_batch):
                sampled(batch, decoding)
            torch.cuda.synchronize()

    def theirs(inputs: Path, out: Path, timer: Timer) -> None:
        model = generation.load_model(inputs, "bfloat16")

        def generated(batch: list[list[int]], tokens: int) -> None:
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(one)) + one for one in batch])
            mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in batch])
            model.generate(
                input_ids=ids.cuda(),
                attention_mask=mask.cuda(),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=True,
                temperature=generation.TEMPERATURE,
                top_k=0,
                top_p=1.0,
                num_return_sequences=generation.SAMPLES,
                pad_token_id=0,
                eos_token_id=-1,
            )

        with torch.inference_mode():
            generated(asked[:2], 4)
            torch.cuda.synchronize()
            with timer():
                for batch in generation.batches(asked, prompts_per_batch):
                    generated(batch, generation.TOKENS)
                torch.cuda.synchronize()

    what = f"generation, {generation.SAMPLES} × {generation.PROMPTS} answers of {generation.TOKENS}"
    what += f" tokens, {prompts_per_batch} prompts a batch"
    visit.run(f"{what}: ours", ours, inputs, flops, n_new)
    visit.run(f"{what}: generate", theirs, inputs, flops, n_new)


PARTS: dict[str, Callable[[Visit], None]] = {
    "sft": run_sft,
    "dpo": lambda visit: run_preferences(visit, method="dpo"),
    "reward": lambda visit: run_preferences(visit, method="reward"),
    "ppo": run_ppo,
    "generation": run_generation,
    "profile": lambda visit: run_sft(visit, sides="profile", cases="256x64"),
    "compiled": lambda visit: run_sft(visit, sides="compiled", cases="256x64"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="a directory with one")
    parser.add_argument("--work", type=Path, default=Path("data/bench/gpu"))
    parser.add_argument("--out", type=Path, default=Path("data/bench/gpu.json"))
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    visit = Visit(arguments.work, arguments.tokenizer, arguments.out)
    for name in arguments.only.split(","):
        try:
            PARTS[name](visit)
        except Exception:  # the card is lent for minutes: the others go on
            traceback.print_exc()


if __name__ == "__main__":
    main()
