"""What constrained and ranked decoding cost over free text, and what renormalising would change.

Prints the seconds per user of free and constrained sampling at the same number of tokens, of free
answers to their end, and of ranking; and the share of valid constrained lists. With ``--quality``
also the hits of both scores a ranking could use (``ranked``'s module says which it does, and why).
Validation users only: nothing is chosen on test users.

    python bench/decoding.py --base DIR [--sft DIR] --prompts F --ratings F --movies F
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch

from llmrec_assets.ground.completions import parse_response
from llmrec_assets.ground.metrics import ndcg, slot_gains
from llmrec_assets.ground.recommendations import canonical_ids, seen_sets
from llmrec_assets.models.chat import prompt_ids, stop_ids
from llmrec_assets.models.constrained import CatalogueConstraint, ListGrammar
from llmrec_assets.models.device import pick_device, usable_dtype
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.ranked import Ranking, rank_titles
from llmrec_assets.models.sampling import Decoding, Sample, sample_tokens, stream
from llmrec_assets.models.trie import catalogue_tries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="directory of the base model")
    parser.add_argument("--sft", type=Path, help="directory of an SFT adapter")
    for table in ("prompts", "ratings", "movies"):
        parser.add_argument(f"--{table}", type=Path, required=True, help=f"a stored `{table}`")
    parser.add_argument("--max-prompts", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="of the comparison at equal length")
    parser.add_argument("--beams", type=int, default=40)
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quality", action="store_true", help="hits of both scores of a ranking")
    arguments = parser.parse_args()

    device = pick_device()
    model, tokenizer = load_policy(
        arguments.base,
        [arguments.sft] if arguments.sft else [],
        dtype=usable_dtype(device, "bfloat16"),
        device=device.torch,
    )
    prompts = pd.read_parquet(arguments.prompts)
    prompts = prompts[prompts["split"] == "validation"].head(arguments.max_prompts)
    ratings, movies = pd.read_parquet(arguments.ratings), pd.read_parquet(arguments.movies)
    begun = time.monotonic()
    tries = catalogue_tries(tokenizer, movies, arguments.top_k)
    print(
        f"{device.name}, {torch.get_num_threads()} threads; {len(tries.titles)} titles, tries in "
        f"{time.monotonic() - begun:.2f} s"
    )
    keys = list(zip(prompts["user_id"].tolist(), prompts["window_index"].tolist(), strict=True))
    seen = seen_sets(prompts, ratings, movies)
    open_titles = [tries.open_titles(seen[key]) for key in keys]
    names = [f"user {user}" for user, _ in keys]
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts["prompt"]]
    stops, pad = stop_ids(tokenizer, model), tokenizer.pad_token_id
    grammar = ListGrammar(tries)
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    batches = [
        order[start : start + arguments.batch_size]
        for start in range(0, len(order), arguments.batch_size)
    ]

    def sample(n_tokens: int, ends: list[int], constrained: bool) -> list[Sample]:
        samples = []
        for batch in batches:
            starts = [grammar.start(names[i], open_titles[i]) for i in batch]
            answers = sample_tokens(
                model,
                [asked[i] for i in batch],
                [[stream(0, "bench", *keys[i])] for i in batch],
                Decoding(n_tokens, temperature=0.7),
                stops=ends,
                pad=pad,
                constraint=CatalogueConstraint(grammar, starts) if constrained else None,
            )
            samples += [answer for (answer,) in answers]
        return samples

    def rank(renormalised: bool = False) -> list[Ranking]:
        rankings = []
        for batch in batches:
            rankings += rank_titles(
                model,
                [asked[i] for i in batch],
                [names[i] for i in batch],
                [open_titles[i] for i in batch],
                tries,
                beams=arguments.beams,
                pad=pad,
                renormalised=renormalised,
            )
        return rankings

    runs: dict[str, Callable[[], Any]] = {
        f"free, {arguments.tokens} tokens": lambda: sample(arguments.tokens, [], False),
        f"constrained, {arguments.tokens} tokens": lambda: sample(arguments.tokens, [], True),
        "free, to its end": lambda: sample(128, stops, False),
        "constrained, to its end": lambda: sample(tries.max_tokens, stops, True),
        f"ranked, {arguments.beams} beams": rank,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results = {}
    for _ in range(arguments.repeats):  # in turn, so that a slow minute slows all of them
        for name, run in runs.items():
            begun = time.monotonic()
            results[name] = run()
            seconds[name].append((time.monotonic() - begun) / len(asked))
    free, constrained, to_end, listed, ranked = (median(seconds[name]) for name in runs)
    for name in runs:
        lengths = [len(r.tokens) if isinstance(r, Sample) else r.n_tokens for r in results[name]]
        spread = f"{min(seconds[name]):.3f} to {max(seconds[name]):.3f}"
        print(
            f"{name:28} {median(seconds[name]):.3f} s a user ({spread}), {np.mean(lengths):.1f} "
            "tokens"
        )
    print(f"constrained over free at equal tokens: {constrained / free:.3f}")
    print(f"constrained over free, each to its end: {listed / to_end:.3f}")
    print(f"ranked over free: {ranked / to_end:.3f}")

    known = dict(zip(tries.titles, tries.films.tolist(), strict=True))
    valid = 0
    for i, answer in zip(order, results["constrained, to its end"], strict=True):
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        films = [known.get(item) for item in parse_response(text)]
        valid += (
            len(set(films)) == len(films) == arguments.top_k
            and None not in films
            and not seen[keys[i]] & set(films)
        )
    print(f"valid constrained lists: {valid} of {len(asked)}")

    if arguments.quality:
        film_of = canonical_ids(movies)
        truths = [{film_of[f] for f in row} for row in prompts["ground_truth_movie_ids"]]
        for name, renormalised in (("log P(title)", False), ("renormalised by the trie", True)):
            lists = [
                [int(tries.films[title]) for title in ranking.titles]
                for ranking in (rank(True) if renormalised else results[list(runs)[-1]])
            ]
            gains = [
                slot_gains(films, truths[i], seen[keys[i]])
                for i, films in zip(order, lists, strict=True)
            ]
            score = np.mean([ndcg(g, len(truths[i])) for i, g in zip(order, gains, strict=True)])
            print(
                f"{name:26} {np.sum(gains)} hits, NDCG {score:.4f}, "
                f"{len({f for films in lists for f in films})} distinct films"
            )


if __name__ == "__main__":
    main()
