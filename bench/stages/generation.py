"""Five sampled answers to each of 64 prompts: SmolLM2, Figure 2 prompts, 64 tokens an answer.

Peers: transformers' ``generate`` prompt by prompt with ``num_return_sequences``, the same in
batches of as many prompts as ours, and llama.cpp's own server engine with as many sequences at once
(the wheel of xllamacpp; ``make bench`` installs it) on the same weights in the same type. Every
answer is sampled to its full length by all, so that all generate as many tokens (ours would gain
more where answers end: ended rows leave the batch).

Samples differ by their noise, so what is compared is what all must share: the greedy answer to
every eighth prompt, token by token, in float32. llama.cpp ends an answer at an end token or never
draws one, so its texts are compared up to ours' first; it sums in another order, and after a near
tie nothing is alike: most must be equal, and the note tells how many are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.frame import OURS, Bench, Figure, Peer, Row, Timer
from bench.language_models import (
    SEED,
    body_parameters,
    compared,
    dtype_name,
    figure2_prompts,
    gguf_copy,
    keep,
    kept,
    peak_flops,
    smollm2,
)
from llmrec_assets.models.chat import prompt_ids, stop_ids
from llmrec_assets.models.device import pick_device
from llmrec_assets.models.packed import pack
from llmrec_assets.models.sampling import Decoding, sample_tokens, stream

PROMPTS = 64
SAMPLES = 5
TOKENS = 64
PROMPTS_PER_BATCH = 16
TEMPERATURE = 0.7


def rows(bench: Bench) -> list[Row]:
    import json

    inputs = bench.directory("generation", "inputs")
    base = smollm2(inputs)
    prompts = figure2_prompts(PROMPTS)
    prompts.to_parquet(inputs / "prompts.parquet")
    gguf_copy(inputs / "model.gguf", dtype_name())
    if dtype_name() != "float32":
        gguf_copy(inputs / "exact.gguf", "float32")
    config = json.loads((base / "config.json").read_text())
    asked = prompt_tokens(inputs)
    n_prompt = sum(map(len, asked))
    n_new = PROMPTS * SAMPLES * TOKENS
    dtype = dtype_name()
    peak = peak_flops(getattr(torch, dtype))
    flops = 2 * body_parameters(config) * (n_prompt + n_new)
    flops += 2 * config["hidden_size"] * config["vocab_size"] * n_new

    def floor(ours: Figure) -> tuple[str, str]:
        return (
            f"{flops / peak:.3g} s (ours uses {flops / ours.seconds / peak:.0%} of the peak); "
            f"{n_new / ours.seconds:,.0f} tokens/s",
            f"{flops / 1e12:.2f} · 10^12 operations, each prompt once and its five answers, "
            f"without attention, at {peak / 1e9:,.0f} · 10^9 a second in {dtype}. Five answers to "
            "16 prompts are 80 rows a step: the products, not the reading of the weights, take "
            "the time",
        )

    row = compared(
        bench,
        "generation",
        f"generation, n = {SAMPLES} × {PROMPTS} prompts, {TOKENS} tokens each",
        inputs,
        "ours",
        [
            Peer("generate, prompt by prompt", "generate_each", goal=3, repeats=1),
            Peer(f"generate, {PROMPTS_PER_BATCH} prompts a batch", "generate_batched", 1.5, 2),
            Peer(f"llama.cpp, {PROMPTS_PER_BATCH * SAMPLES} at once", "llama_cpp", 1.5, 2),
        ],
        check,
        f"{n_prompt:,} prompt tokens, {n_new:,} new ones, {dtype}",
        floor,
    )
    return [row]


def check(out: Mapping[str, Path]) -> str:
    found = {name: kept(path) for name, path in out.items()}
    for name, facts in found.items():
        assert facts["new"] == PROMPTS * SAMPLES * TOKENS, (name, facts["new"])
    ours, said = found.pop(OURS), []
    for name, theirs in found.items():
        if "greedy" in theirs:
            same = [a == b for a, b in zip(ours["greedy"], theirs["greedy"], strict=True)]
            assert all(same), f"{name}: greedy answers differ"
        else:
            assert all(ours["texts"]), "an answer of ours ends at once: nothing to compare"
            pairs = zip(ours["texts"], theirs["texts"], strict=True)
            same = [text.startswith(mine) for mine, text in pairs]
            assert 2 * sum(same) > len(same), (name, ours["texts"], theirs["texts"])
        said.append(f"{sum(same)} of {len(same)} ({name})")
    engine = next((facts["engine"] for facts in found.values() if "engine" in facts), "")
    return f"Greedy answers equal to ours: {', '.join(said)}. llama.cpp: {engine}"


def prompt_tokens(inputs: Path) -> list[list[int]]:
    """Prompts of similar length beside each other, as ours batches them."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "base")
    texts = pd.read_parquet(inputs / "prompts.parquet")["prompt"]
    return sorted((prompt_ids(tokenizer, text) for text in texts), key=len)


def load_model(inputs: Path, dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(inputs / "base", dtype=getattr(torch, dtype))
    return model.to(pick_device().torch).eval()


def batches(asked: list[list[int]], size: int) -> list[list[list[int]]]:
    return [asked[start : start + size] for start in range(0, len(asked), size)]


def ours(inputs: Path, out: Path, timer: Timer) -> None:
    asked, model = prompt_tokens(inputs), load_model(inputs, dtype_name())
    pack(model)  # as the stages do that answer

    def sampled(model: Any, prompts: list[list[int]], n: int, decoding: Decoding) -> list[Any]:
        streams = [[stream(SEED, "bench", i, j) for j in range(n)] for i in range(len(prompts))]
        # Nothing ends an answer: -1 is no token.
        return sample_tokens(model, prompts, streams, decoding, stops=[-1], pad=0)

    new = 0
    decoding = Decoding(TOKENS, temperature=TEMPERATURE)
    sampled(model, asked[:2], 1, Decoding(2))  # warms up
    with timer():
        for batch in batches(asked, PROMPTS_PER_BATCH):
            answers = sampled(model, batch, SAMPLES, decoding)
            new += sum(len(one.tokens) for some in answers for one in some)
    del model
    exact = load_model(inputs, "float32")
    pack(exact)
    greedy = sampled(exact, asked[::8], 1, Decoding(TOKENS, do_sample=False))
    told = [one.tokens for (one,) in greedy]
    tokenizer = AutoTokenizer.from_pretrained(inputs / "base")
    ends = set(stop_ids(tokenizer, exact))
    until = [list(takewhile(lambda token: token not in ends, tokens)) for tokens in told]
    keep(out, new=new, greedy=told, texts=[tokenizer.decode(tokens) for tokens in until])


def generate_each(inputs: Path, out: Path, timer: Timer) -> None:
    _generate(inputs, out, timer, 1)


def generate_batched(inputs: Path, out: Path, timer: Timer) -> None:
    _generate(inputs, out, timer, PROMPTS_PER_BATCH)


def _generate(inputs: Path, out: Path, timer: Timer, size: int) -> None:
    asked, model = prompt_tokens(inputs), load_model(inputs, dtype_name())
    torch.manual_seed(SEED)

    def generated(model: Any, batch: Sequence[list[int]], tokens: int, **options: Any) -> Any:
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in batch])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in batch])
        with torch.inference_mode():
            whole = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
                eos_token_id=-1,  # nothing ends an answer
                top_k=0,
                top_p=1.0,
                **options,
            )
        return whole[:, width:].tolist()

    generated(model, asked[:2], 2, do_sample=False)  # warms up
    new = 0
    with timer():
        for batch in batches(asked, size):
            answers = generated(
                model,
                batch,
                TOKENS,
                do_sample=True,
                temperature=TEMPERATURE,
                num_return_sequences=SAMPLES,
            )
            new += sum(map(len, answers))
    exact = load_model(inputs, "float32")
    greedy = [
        answer
        for batch in batches(asked[::8], size)
        for answer in generated(exact, batch, TOKENS, do_sample=False)
    ]
    keep(out, new=new, greedy=greedy)


def llama_cpp(inputs: Path, out: Path, timer: Timer) -> None:
    """One server engine, a slot for each answer at once; a prompt's answers share its prefill."""
    import xllamacpp

    asked, dtype = prompt_tokens(inputs), dtype_name()
    longest = max(map(len, asked))
    answer = _llama_cpp(inputs / "model.gguf", PROMPTS_PER_BATCH * SAMPLES, longest)
    answer(asked[:2], 2, 1, temperature=0.0)  # warms up
    with timer():
        answers, new = answer(asked, TOKENS, SAMPLES, temperature=TEMPERATURE)
    assert len(answers) == len(asked) * SAMPLES, len(answers)
    exact = inputs / ("model.gguf" if dtype == "float32" else "exact.gguf")
    answer = _llama_cpp(exact, PROMPTS_PER_BATCH, longest, exact=True)
    texts, _ = answer(asked[::8], TOKENS, 1, temperature=0.0)
    keep(out, new=new, texts=texts, engine=xllamacpp.get_system_info().strip())


def _llama_cpp(model: Path, slots: int, longest: int, *, exact: bool = False) -> Any:
    """``(prompts, tokens, n, temperature)`` to all answers, prompt by prompt, and how many tokens
    they have. Its default keeps keys and values in float16, which is its fastest way (float32: a
    third slower, one run); ``exact`` keeps them in float32, as ours does."""
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_parallel = slots
    params.n_ctx = slots * (longest + TOKENS + 8)
    params.cpuparams.n_threads = torch.get_num_threads()
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_ram_mib = 0  # no copies of ended answers
    params.verbosity = -1
    server = xllamacpp.Server(params)

    def answered(prompt: list[int], tokens: int, n: int, temperature: float) -> dict[str, Any]:
        found = server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": tokens,
                "n": n,
                "temperature": temperature,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
                "seed": SEED,
            }
        )
        assert "choices" in found, found
        assert len(found["choices"]) == n, found
        # Of the first answer alone; "length" is also what a full context is called.
        assert found["usage"]["completion_tokens"] == tokens, found["usage"]
        assert all(choice["finish_reason"] == "length" for choice in found["choices"]), found
        return found

    def answer(
        prompts: Sequence[list[int]], tokens: int, n: int, *, temperature: float
    ) -> tuple[list[str], int]:
        with ThreadPoolExecutor(max(1, slots // n)) as pool:
            some = list(pool.map(lambda one: answered(one, tokens, n, temperature), prompts))
        texts = [choice["text"] for one in some for choice in one["choices"]]
        return texts, sum(n * one["usage"]["completion_tokens"] for one in some)

    return answer
