"""Does a language model know something of a user's next films that EASE does not?

EASE, told what the prompt shows, proposes films for every validation and test window. They are
ordered by the sum of EASE's score, a weight times the model's log P(title | prompt) and a weight
times the logarithm of the film's popularity, each standardised over the window's candidates. The
weights are chosen on validation users; test users are scored by the orders of the table alone.
The order without the model has the same grid for popularity: the difference is the model's.

Every test user is asked, also where the recipe bounds them in the metric table.

    python bench/fusion.py --dataset ml-1m --recipe cpu-one-window     # of LLMREC_HOME
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmrec_assets.ground.intervals import bootstrap_means
from llmrec_assets.ground.metrics import ndcg, slot_gains
from llmrec_assets.ground.recipes import Recipe, load_recipe
from llmrec_assets.ground.recommendations import canonical_ids, seen_sets
from llmrec_assets.ground.recommender import Window, windows_of
from llmrec_assets.ground.significance import sign_flip_p_values
from llmrec_assets.ground.stages import policy_problems
from llmrec_assets.models.chat import prompt_ids
from llmrec_assets.models.classical import LensKitScorer, ScoredRecommender, component
from llmrec_assets.models.classical_lists import Tables
from llmrec_assets.models.device import pick_device, usable_dtype
from llmrec_assets.models.loading import load_policy, precision
from llmrec_assets.models.packed import pack
from llmrec_assets.models.ranked import rank_titles
from llmrec_assets.models.trie import catalogue_tries
from llmrec_assets.orchestration.resources import StoreResource

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
#: Of EASE's score, the model's and popularity.
Weights = tuple[float, float, float]

INFORMATION_SET = "prompt"
MODEL_WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0)
POPULARITY_WEIGHTS = (0.0, 0.1, -0.1, 0.2, -0.2, 0.3, -0.3, 0.5, -0.5, 0.7, -0.7, 1.0, -1.0)


@dataclass(frozen=True)
class Asked:
    """Windows of one split with their candidates, one row a window: films [windows, length], and
    EASE's scores, the model's and popularity's logarithm, standardised, [3, windows, length]."""

    windows: Sequence[Window]
    truths: Sequence[frozenset[int]]
    films: Ids
    features: Floats

    def ndcg(self, weights: Weights, k: int) -> Floats:
        """NDCG@k by window, of the candidates in the order of the weighted sum."""
        total = np.tensordot(np.array(weights), self.features, axes=1)
        best = np.argsort(-total, axis=1, kind="stable")[:, :k]
        lists = np.take_along_axis(self.films, best, axis=1).tolist()
        return np.array(
            [
                ndcg(slot_gains(films, truth, window.hidden), len(truth))
                for films, truth, window in zip(lists, self.truths, self.windows, strict=True)
            ]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--candidates", type=int, default=40, help="films a window")
    parser.add_argument("--max-users", type=int, help="of each split, by id; default: all")
    parser.add_argument("--base", action="store_true", help="the base model, without SFT's adapter")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    if arguments.candidates < recipe.windows.top_k:
        parser.error(f"a list needs {recipe.windows.top_k} candidates")

    store, partition = StoreResource().store(), f"{arguments.dataset}|{arguments.recipe}"
    ratings = store.read_table("ratings", arguments.dataset).frame
    prompts = store.read_table("prompts", partition)
    movies, splits = (
        store.read_table(name, partition).frame for name in ("catalogue", "user_splits")
    )
    base = store.checkpoint("base_model", arguments.recipe)
    adapters = [] if arguments.base else [store.checkpoint("sft_checkpoint", partition)]
    stage = "base" if arguments.base else "sft"
    problems = policy_problems(stage, base, adapters, partition, prompts.version)
    told = prompts.frame.merge(splits, how="left", on="user_id", suffixes=("", "_now"))
    if (told["split"] != told["split_now"]).any():
        problems.append("prompts are of another split than user_splits: materialize them again")
    if problems:
        raise SystemExit("; ".join(problems))

    tables = Tables(prompts.frame, splits, ratings, movies, recipe, recipe.seed)
    sides, values = asked_of(
        tables, prompts.frame, recipe, base, adapters, arguments.candidates, arguments.max_users
    )
    validation, test = sides["validation"], sides["test"]
    k = recipe.windows.top_k
    grid = {
        (1.0, model, popularity): validation.ndcg((1.0, model, popularity), k).mean()
        for model, popularity in product(MODEL_WEIGHTS, POPULARITY_WEIGHTS)
    }

    def chosen(model_weights: Sequence[float]) -> Weights:
        return max((w for w in grid if w[1] in model_weights), key=grid.__getitem__)

    rows: dict[str, Weights] = {
        "EASE": (1.0, 0.0, 0.0),
        "EASE and popularity": chosen((0.0,)),
        "EASE, popularity and the model": chosen(MODEL_WEIGHTS),
        "the model, of EASE's candidates": (0.0, 1.0, 0.0),
    }
    print(
        f"{partition}, {stage}; {arguments.candidates} films a window by EASE ({values}); "
        f"{len(validation.windows)} validation and {len(test.windows)} test users\n\n"
        f"| order | weights | validation NDCG@{k} % | test NDCG@{k} % |\n|---|---|---|---|"
    )
    scores = np.column_stack([test.ndcg(weights, k) for weights in rows.values()])
    resamples, confidence = recipe.evaluation.resamples, recipe.evaluation.confidence
    mean, low, high = 100 * np.array(bootstrap_means(scores, resamples, recipe.seed, confidence))
    for i, (name, weights) in enumerate(rows.items()):
        before = 100 * validation.ndcg(weights, k).mean()
        print(
            f"| {name} | {weights} | {before:.2f} | {mean[i]:.2f} [{low[i]:.2f}, {high[i]:.2f}] |"
        )
    gain = scores[:, [2]] - scores[:, [1]]
    ends = bootstrap_means(gain, resamples, recipe.seed, confidence, np.array([True]))
    mean, low, high = 100 * np.array(ends)
    (p,) = sign_flip_p_values(gain, 10_000, recipe.seed)
    print(f"\nthe model's part: {mean[0]:+.2f} [{low[0]:+.2f}, {high[0]:+.2f}] points, p {p:.3f}")


def asked_of(
    tables: Tables,
    prompts: pd.DataFrame,
    recipe: Recipe,
    base: Path,
    adapters: Sequence[Path],
    length: int,
    max_users: int | None,
) -> tuple[dict[str, Asked], dict[str, Any]]:
    """By split, one window a user; and EASE's hyperparameters, which validation users chose."""
    scorer, catalogue, values = tuned_ease(tables, recipe)
    raters = tables.events().drop_duplicates(["user_id", "film"])["film"].value_counts().to_dict()
    popularity = np.log1p([raters.get(film, 0) for film in catalogue])
    film_of = canonical_ids(tables.movies)
    read_titles = title_reader(base, adapters, recipe, tables.movies, length)
    found = {}
    for split in ("validation", "test"):
        rows = prompts[prompts["split"] == split].sort_values(["user_id", "window_index"])
        rows = rows.groupby("user_id").head(1).head(max_users or len(rows))
        windows = windows_of(
            rows,
            tables.ratings,
            tables.movies,
            seen_sets(rows, tables.ratings, tables.movies),
            information_set=INFORMATION_SET,
            liked_min=recipe.windows.liked_min,
            shown_per_class=recipe.prompts.max_per_class
            if recipe.prompts.template == "figure2"
            else None,
        )
        scores = np.nan_to_num(scorer.scores(windows), nan=-np.inf).astype(np.float64)
        hidden = [np.isin(catalogue, list(window.hidden)) for window in windows]
        scores[np.array(hidden)] = -np.inf
        columns = np.argsort(-scores, axis=1, kind="stable")[:, :length]
        films, of_ease = catalogue[columns], np.take_along_axis(scores, columns, axis=1)
        if not np.isfinite(of_ease).all():
            raise SystemExit(f"EASE has a score of fewer than {length} films for some window")
        texts = rows["prompt"].tolist()
        of_model = read_titles(texts, windows, films)
        truths = [
            frozenset(film_of.get(int(i), int(i)) for i in ids)
            for ids in rows["ground_truth_movie_ids"]
        ]
        features = [standardised(one) for one in (of_ease, of_model, popularity[columns])]
        found[split] = Asked(windows, truths, films, np.array(features))
    return found, values


def standardised(values: Floats) -> Floats:
    """Each row with mean 0 and standard deviation 1; a row without spread is zeros."""
    centred = values - values.mean(axis=1, keepdims=True)
    spread = values.std(axis=1, keepdims=True)
    return np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)


def tuned_ease(tables: Tables, recipe: Recipe) -> tuple[LensKitScorer, Ids, dict[str, Any]]:
    """EASE as its row of ``classical_lists`` is tuned, the films of its columns, its values."""
    events = tables.events()
    catalogue = tables.ranking(events)
    grid = recipe.baselines.ease.model_dump()
    best: tuple[float, LensKitScorer, dict[str, Any]] | None = None
    for feedback, regularization in product(grid["feedback"], grid["regularization"]):
        fitted = LensKitScorer(
            component("ease", {"regularization": regularization}),
            events,
            catalogue,
            only_liked=feedback == "liked",
            liked_min=tables.liked_min,
            seed=tables.seed,
        )
        for last in sorted({min(n, recipe.windows.window_size) for n in grid["last"]}):
            scorer = fitted.using(last)
            score = tables.validation_ndcg(ScoredRecommender(scorer, catalogue), INFORMATION_SET)
            if best is None or score > best[0]:
                values = {"feedback": feedback, "regularization": regularization, "last": last}
                best = score, scorer, values
    assert best is not None
    return best[1], np.array(catalogue), best[2]


def title_reader(
    base: Path, adapters: Sequence[Path], recipe: Recipe, movies: pd.DataFrame, length: int
) -> Callable[[Sequence[str], Sequence[Window], Ids], Floats]:
    """Loads the model; gives its log P(title | prompt) of every candidate, [windows, length]."""
    device = pick_device()
    dtype = usable_dtype(device, recipe.generation.dtype)
    model, tokenizer = load_policy(base, adapters, dtype=dtype, device=device.torch)
    pack(model)
    tries = catalogue_tries(tokenizer, movies, length)

    def read(prompts: Sequence[str], windows: Sequence[Window], films: Ids) -> Floats:
        tokens = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        order = sorted(range(len(windows)), key=lambda i: len(tokens[i]))
        found = np.empty(films.shape)
        began, size = time.monotonic(), recipe.generation.batch_size
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            titles = [
                tries.open_titles(windows[i].hidden, frozenset(films[i].tolist())) for i in batch
            ]
            with precision(model):
                rankings = rank_titles(
                    model,
                    [tokens[i] for i in batch],
                    [f"user {windows[i].user_id}" for i in batch],
                    titles,
                    tries,
                    beams=max(length, *(int(own.sum()) for own in titles)),  # none is left out
                    pad=tokenizer.pad_token_id,
                )
            for i, ranking in zip(batch, rankings, strict=True):
                of_film = dict(
                    zip(tries.films[list(ranking.titles)], ranking.log_probabilities, strict=True)
                )
                found[i] = [of_film[film] for film in films[i]]
            print(
                f"{start + len(batch)}/{len(order)}, {time.monotonic() - began:.0f} s", flush=True
            )
        return found

    return read


if __name__ == "__main__":
    main()
