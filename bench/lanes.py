"""What packing the output layer, and batches side by side, save of sampling answers on a CPU.

Every row samples the same answers: one of ``--tokens`` tokens to each of the first test prompts, in
the order of their length. Rows take turns, forwards and backwards.

    python bench/lanes.py --base DIR [--adapter DIR …] --prompts FILE
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pandas as pd
import torch

from llmrec_assets.models.chat import prompt_ids
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.memory import FittingBatches
from llmrec_assets.models.packed import pack
from llmrec_assets.models.sampling import Decoding, Sample, sample_tokens, stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="directory of the base model")
    parser.add_argument(
        "--adapter", type=Path, action="append", default=[], help="SFT's, then a live one"
    )
    parser.add_argument("--prompts", type=Path, required=True, help="a stored `prompts`")
    parser.add_argument("--max-prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()

    def load() -> tuple[object, object]:
        return load_policy(
            arguments.base, arguments.adapter, dtype=torch.float32, device=torch.device("cpu")
        )

    plain, tokenizer = load()
    packed, _ = load()
    pack(packed)
    prompts = pd.read_parquet(arguments.prompts)
    prompts = prompts[prompts["split"] == "test"].head(arguments.max_prompts)
    asked = sorted((prompt_ids(tokenizer, text) for text in prompts["prompt"]), key=len)
    decoding = Decoding(max_new_tokens=arguments.tokens, temperature=0.7)

    def answers(model: object, size: int, lanes: int) -> tuple[float, list[list[int]]]:
        def run(batch: Sequence[int]) -> list[list[Sample]]:
            streams = [[stream(1, "response", i)] for i in batch]
            return sample_tokens(
                model, [asked[i] for i in batch], streams, decoding, stops=[], pad=0
            )

        batches = FittingBatches("answers", "prompt", size, torch.device("cpu"), "", lanes=lanes)
        begun = time.monotonic()
        found = list(batches.map(range(len(asked)), run))
        return time.monotonic() - begun, [s.tokens for _, rows in found for (s,) in rows]

    sides = {
        "plain, 16 at once": (plain, 16, 1),
        "packed, 16 at once": (packed, 16, 1),
        "packed, 32 at once": (packed, 32, 1),
        "packed, two lanes of 8": (packed, 8, 2),
        "packed, two lanes of 16": (packed, 16, 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    texts: dict[str, list[list[int]]] = {}
    for turn in range(arguments.repeats):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            took, texts[name] = answers(*sides[name])
            seconds[name].append(took)
    (first, *_), (wanted, *_) = seconds.values(), texts.values()
    print(f"{torch.get_num_threads()} threads, {len(asked)} answers of {arguments.tokens} tokens")
    for name, took in seconds.items():
        same = sum(a == b for a, b in zip(texts[name], wanted, strict=True))
        print(
            f"{name}: {median(took):.1f} s [{min(took):.1f}, {max(took):.1f}], "
            f"{median(took) / median(first):.2f}, {same} of {len(asked)} texts as in the first row"
        )


if __name__ == "__main__":
    main()
