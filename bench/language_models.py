"""What the stages with a language model share: model, prompts, step times, the machine's peak.

Their inputs have one size (a training step costs the same at any length of training), so instead of
an exponent their rows tell the share of the machine's arithmetic that was used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import TrainerCallback

from bench.frame import OURS, PROJECT, Bench, Figure, Peer, Row, Timer, measure, vars_of
from llmrec_assets.ground import movielens
from llmrec_assets.ground.model_files import gguf_file
from llmrec_assets.ground.prompts import render_prompts
from llmrec_assets.ground.recipes import LoraRecipe, load_recipe
from llmrec_assets.ground.splits import split_users
from llmrec_assets.ground.windows import interaction_windows
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.device import pick_device, usable_dtype
from llmrec_assets.models.progress import ProgressEvent

SEED = 1


def smollm2(directory: Path) -> Path:
    """SmolLM2-135M-Instruct as the recipes use it, converted once a bench."""
    base = directory / "base"
    if not (base / "config.json").exists():
        prepare_base_model(load_recipe("cpu").base_model, base)
    return base


def gguf_copy(path: Path, dtype: str) -> None:
    """The same weights for llama.cpp: the recipe's GGUF file, its quantised tensors unpacked and
    rounded as ours are, written in ``dtype`` (vectors in float32, as llama.cpp wants them)."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(gguf_file(load_recipe("cpu").base_model))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    kind = gguf.GGMLQuantizationType.BF16 if dtype == "bfloat16" else gguf.GGMLQuantizationType.F32
    # Written by the writer itself, or no longer true.
    left_out = ("GGUF.", "general.architecture", "general.file_type", "general.quantization")
    for name, field in reader.fields.items():
        if name.startswith(left_out):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, fields[name], field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        exact = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        rounded = exact.to(torch.bfloat16).to(torch.float32).numpy()
        if rounded.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, rounded)
        else:
            packed = gguf.quantize(np.ascontiguousarray(rounded), kind)
            writer.add_tensor(tensor.name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def figure2_prompts(n: int) -> pd.DataFrame:
    """``PROMPTS`` of the embedded sample's training users with the paper's own template, the first
    n by user."""
    recipe = load_recipe("paper")
    directory = PROJECT / "data" / "sample"
    users = movielens.read_users(directory, "sample")
    movies = movielens.read_movies(directory, "sample")
    ratings = movielens.read_ratings(directory, "sample", users, movies)
    windows = interaction_windows(
        ratings,
        split_users(users["user_id"], recipe.splits, SEED),
        recipe.windows,
        SEED,
        canonical=movies[["movie_id", "canonical_movie_id"]],
    )
    prompts = render_prompts(windows, users, movies, recipe.prompts, recipe.windows)
    rows = prompts[prompts["split"] == "train"].sort_values(["user_id", "window_index"])
    if len(rows) < n:
        raise ValueError(f"the sample has {len(rows)} training prompts, {n} are asked for")
    return rows.head(n).reset_index(drop=True)


def dtype_name() -> str:
    """bfloat16 where the device computes in it, else float32; both sides compute in it."""
    return str(usable_dtype(pick_device(), "bfloat16")).removeprefix("torch.")


class StepClock(TrainerCallback):
    """Times all steps of a training but the first ``warm_up``. Ours tells of each step by
    ``progress``; a trainer of a peer has this as its callback."""

    def __init__(self, timer: Timer, warm_up: int = 1) -> None:
        self._timer = timer
        self._ends: list[tuple[float, float]] = []
        self._warm_up = warm_up

    def __call__(self, event: ProgressEvent) -> None:
        if event.loss is not None:
            self._step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._step()

    def _step(self) -> None:
        self._ends.append((time.perf_counter(), time.process_time()))
        if len(self._ends) < self._warm_up:
            return
        (wall, cpu), (last_wall, last_cpu) = self._ends[self._warm_up - 1], self._ends[-1]
        self._timer.seconds, self._timer.cpu_seconds = last_wall - wall, last_cpu - cpu


def settings(inputs: Path, **defaults: Any) -> dict[str, Any]:
    """``settings.json`` of a stage's input over these."""
    file = inputs / "settings.json"
    return defaults | (json.loads(file.read_text()) if file.exists() else {})


def keep(out: Path, **facts: Any) -> None:
    """What a side found, for the check."""
    (out / "facts.json").write_text(json.dumps(facts))


def kept(out: Path) -> dict[str, Any]:
    return json.loads((out / "facts.json").read_text())


def require_alike(name: str, values: Mapping[str, Sequence[float]], tolerance: float) -> str:
    """Asserts that two sides' numbers, in order, differ by at most ``tolerance`` (relative)."""
    ours = values[OURS]
    worst = 0.0
    for theirs in values.values():
        assert len(theirs) == len(ours) > 0, f"{name}: {values}"
        for mine, other in zip(ours, theirs, strict=True):
            worst = max(worst, abs(mine - other) / max(abs(mine), abs(other), 1e-9))
    assert worst <= tolerance, f"{name} differ by {worst:.2%}: {values}"
    return f"{name} differ by at most {worst:.2%} (accepted: {tolerance:.0%})"


def peak_flops(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a 2048 × 2048 × 2048 product, the best of ten."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


def body_parameters(config: Mapping[str, Any]) -> int:
    """Weights that every token is multiplied with: all layers, without the (tied) embeddings."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    attention = 2 * width * width + 2 * width * width * kv_heads // heads
    return config["num_hidden_layers"] * (attention + 3 * width * inner)


def lora_parameters(config: Mapping[str, Any], lora: LoraRecipe) -> int:
    """Weights of an adapter on all linear layers."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    kv = width * config["num_key_value_heads"] // config["num_attention_heads"]
    sides = [2 * width, 2 * width, width + kv, width + kv, *[width + inner] * 3]
    return config["num_hidden_layers"] * lora.r * sum(sides)


def sft_flops(
    config: Mapping[str, Any], lora: LoraRecipe, examples: Sequence[Mapping[str, Sequence[int]]]
) -> float:
    """Floating-point operations of an epoch of SFT.

    Forward, and backward to the activations: the base model's own weights have no gradient. Output
    layer on answer tokens only, adapters three times, causal attention (half of L × L).
    """
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    n_tokens = sum(len(e["input_ids"]) for e in examples)
    n_answer = sum(label != -100 for e in examples for label in e["labels"])
    squares = sum(len(e["input_ids"]) ** 2 for e in examples)
    return (
        4 * body_parameters(config) * n_tokens
        + 4 * width * config["vocab_size"] * n_answer
        + 6 * lora_parameters(config, lora) * n_tokens
        + 3 * 2 * width * layers * squares
    )


def compared(
    bench: Bench,
    stage: str,
    title: str,
    inputs: Path,
    ours: str,
    peers: Sequence[Peer],
    check: Callable[[Mapping[str, Path]], str],
    told: str,
    floor: Callable[[Figure], tuple[str, str]],
) -> Row:
    """One input, ours and the peers in turns; one run of each unless the bench is told to repeat.

    Args:
        floor: what the row says of the machine's floor, and a note on how it was computed.
    """
    turns = {OURS: (ours, bench.repeats)} | {p.name: (p.side, p.repeats) for p in peers}
    out = {name: bench.directory(stage, "out", str(i)) for i, name in enumerate(turns)}
    runs: dict[str, list[Any]] = {name: [] for name in turns}
    for turn in range(bench.repeats):
        for name in list(turns)[:: 1 if turn % 2 == 0 else -1]:
            side, repeats = turns[name]
            if turn < repeats:
                runs[name].append(measure(stage, side, inputs, out[name], limit_s=3600))
    held = check(out)
    figures = {name: Figure(some) for name, some in runs.items()}
    goals, cells = {}, []
    for peer in peers:
        ratio = figures[peer.name].seconds / figures[OURS].seconds
        goals[f"{ratio:.3g} × {peer.name}, goal {peer.goal:g} ×"] = ratio >= peer.goal
        cells.append(
            (f"{peer.name}: {figures[peer.name].told()}", f"{ratio:.3g} × (≥ {peer.goal:g})")
        )
    cell, why = floor(figures[OURS])
    cpu = "; ".join(f"{name} {figure.cpu_seconds:.3g}" for name, figure in figures.items())
    return Row(
        title,
        figures[OURS].told(),
        cells,
        cell,
        "–",
        goals,
        [f"{title}: {told}. {held}", f"{title}, floor: {why}", f"{title}, CPU seconds: {cpu}"],
        {name: vars_of(figure) for name, figure in figures.items()},
    )
