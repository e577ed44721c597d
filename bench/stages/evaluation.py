"""Metrics of 12 rows of 6,040 users with 10,000 bootstrap resamples.

From lists of five slots to the metric table: NDCG@5, Precision@5 and Recall@5 a user, their means
and 95 % intervals. Peers: LensKit, which scores every list once, and pandas that resamples
LensKit's scores; and NumPy on whole arrays. All three draw the same users, so their intervals are
equal to rounding. Ours checks its input and makes the whole metric table besides (validity, paired
differences).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from bench.frame import Bench, Comparison, Peer, Row, Timer
from llmrec_assets.ground.evaluation import metric_table, user_metrics
from llmrec_assets.ground.intervals import DECIMALS
from llmrec_assets.ground.recipes import EvaluationRecipe

SEED, K, USERS, FILMS = 1, 5, 6_040, 3_883
RESAMPLES = 10_000
#: LensKit's scores are resampled so often, and the time is scaled.
MEASURED_RESAMPLES = 100
METRICS = ("ndcg", "precision", "recall")
ROWS = [
    *((stage, "free") for stage in ("base", "sft", "dpo", "rlhf")),
    *((stage, "ranked") for stage in ("base", "sft", "dpo", "rlhf")),
    *((stage, "ranking") for stage in ("als", "ease", "itemknn", "popularity")),
]


def rows(bench: Bench) -> list[Row]:
    comparison = Comparison(
        stage="evaluation",
        title="evaluation, 10,000 bootstrap resamples, 6,040 users × 12 rows",
        prepare=prepare,
        small=USERS // 10,
        full=USERS,
        ours="ours",
        peers=[
            Peer("LensKit + pandas, resampling loop", "lenskit_loop", goal=20, repeats=2),
            Peer("vectorised NumPy", "vectorised", goal=1, repeats=5),
        ],
        check=check,
        floor=floor,
    )
    return [comparison.row(bench)]


def prepare(directory: Path, size: int) -> str:
    """Five films a list, a ground truth of one to five; better rows hit more often."""
    rng = np.random.default_rng(SEED)
    n_truth = rng.integers(1, K + 1, size)
    truth = _films(rng, size)
    lists = np.empty((len(ROWS), size, K), dtype=np.int64)
    for row in range(len(ROWS)):
        films = _films(rng, size)
        hit = rng.random((size, K)) < 0.02 * (row + 1)
        films = np.where(hit, truth, films)
        for user in np.flatnonzero([len(set(some)) < K for some in films.tolist()]):
            films[user] = truth[user]
        lists[row] = films
    np.savez(directory / "arrays.npz", lists=lists, truth=truth, n_truth=n_truth)
    users = np.arange(1, size + 1)
    names = pd.DataFrame(ROWS, columns=["stage", "decoding"]).loc[np.repeat(range(len(ROWS)), size)]
    lists_of = names.reset_index(drop=True).assign(
        user_id=np.tile(users, len(ROWS)), window_index=0, information_set="prompt"
    )
    slots = lists_of.loc[np.repeat(lists_of.index, K)].reset_index(drop=True)
    slots["rank"] = np.tile(np.arange(1, K + 1), len(lists_of))
    slots["movie_id"] = lists.ravel()
    slots = slots.assign(
        text=slots["movie_id"].astype(str),
        is_duplicate=False,
        is_seen=False,
        prompts_version="p",
        recommendations_version="r",
        checkpoint_version=None,
        answer_version=None,
    )
    slots.to_parquet(directory / "recommendations.parquet")
    pd.DataFrame(
        {
            "user_id": users,
            "window_index": 0,
            "ground_truth_movie_ids": [
                films[:n].tolist() for films, n in zip(truth, n_truth, strict=True)
            ],
        }
    ).to_parquet(directory / "prompts.parquet")
    ids = np.arange(1, FILMS + 1)
    pd.DataFrame({"movie_id": ids, "canonical_movie_id": ids}).to_parquet(
        directory / "movies.parquet"
    )
    return f"{len(ROWS)} rows of {size:,} users, {K} slots a list, invented"


def _films(rng: np.random.Generator, n: int) -> np.ndarray:
    """[n, K], distinct films: equal steps round the catalogue, whose size no number below K
    divides."""
    first, step = rng.integers(0, FILMS, (n, 1)), rng.integers(1, FILMS, (n, 1))
    return (first + step * np.arange(K)) % FILMS + 1


def ours(inputs: Path, out: Path, timer: Timer) -> None:
    recommendations, prompts, movies = (
        pd.read_parquet(inputs / f"{name}.parquet")
        for name in ("recommendations", "prompts", "movies")
    )
    with timer():
        metrics = user_metrics(recommendations, prompts, movies)
        table = metric_table(metrics, EvaluationRecipe(resamples=RESAMPLES), SEED, K)
    table = table.set_index(["stage", "decoding"]).loc[ROWS]
    columns = [[f"{metric}{end}" for metric in METRICS] for end in ("", "_low", "_high")]
    np.save(out / "intervals.npy", np.stack([table[names].to_numpy() for names in columns]))


def lenskit_loop(inputs: Path, out: Path, timer: Timer) -> None:
    from lenskit.data import ItemList, ItemListCollection, UserIDKey
    from lenskit.metrics import NDCG, LogRankWeight, Precision, Recall, RunAnalysis

    arrays = np.load(inputs / "arrays.npz")
    lists, truth, n_truth = arrays["lists"], arrays["truth"], arrays["n_truth"]
    n_users = len(truth)
    with timer():
        wanted = ItemListCollection(UserIDKey)
        for user in range(n_users):
            wanted.add(ItemList(truth[user, : n_truth[user]]), user)
        scores = []
        for films in lists:
            # a fresh one for every row: it accumulates over all it measures
            analysis = RunAnalysis()
            # LensKit discounts by log2(rank) unless told the usual log2(rank + 1)
            analysis.add_metric(NDCG(n=K, weight=LogRankWeight(offset=1)), "ndcg")
            analysis.add_metric(Precision(n=K), "precision")
            analysis.add_metric(Recall(n=K), "recall")
            run = ItemListCollection(UserIDKey)
            for user in range(n_users):
                run.add(ItemList(films[user], ordered=True), user)
            scores.append(analysis.measure(run, wanted).list_metrics()[list(METRICS)])
        values = pd.concat(scores, axis=1)
    rng = np.random.default_rng(SEED)
    means = []
    with timer(times=RESAMPLES / MEASURED_RESAMPLES):
        for _ in range(MEASURED_RESAMPLES):
            means.append(values.iloc[rng.integers(0, n_users, n_users)].mean())
    np.save(out / "means.npy", np.stack([mean.to_numpy() for mean in means]))
    np.save(out / "values.npy", values.to_numpy().mean(axis=0).reshape(len(ROWS), len(METRICS)))


def vectorised(inputs: Path, out: Path, timer: Timer) -> None:
    arrays = np.load(inputs / "arrays.npz")
    lists, truth, n_truth = arrays["lists"], arrays["truth"], arrays["n_truth"]
    with timer():
        known = np.where(np.arange(K) < n_truth[:, None], truth, -1)
        hits = (lists[..., None] == known[:, None, :]).any(axis=-1)
        discount = 1 / np.log2(np.arange(2, K + 2))
        ndcg = (hits * discount).sum(axis=-1) / np.cumsum(discount)[n_truth - 1]
        n_hits = hits.sum(axis=-1)
        values = np.stack([ndcg, n_hits / K, n_hits / n_truth], axis=-1)  # [row, user, metric]
        values = np.ascontiguousarray(values.transpose(1, 0, 2).reshape(len(truth), -1))
        rng = np.random.default_rng(SEED)
        n_users = len(values)
        means = np.empty((RESAMPLES, values.shape[1]))
        for resample in range(RESAMPLES):
            # how often each user is drawn, instead of copying the drawn rows
            counts = np.bincount(rng.integers(0, n_users, n_users), minlength=n_users)
            means[resample] = counts @ values
        means /= n_users
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
    shape = (len(ROWS), len(METRICS))
    estimates = [some.reshape(shape) for some in (values.mean(axis=0), low, high)]
    np.save(out / "intervals.npy", np.stack(estimates))
    np.save(out / "means.npy", means[:MEASURED_RESAMPLES])


def check(inputs: Path, out: Mapping[str, Path]) -> str:
    """Ours and NumPy: all estimates, and all intervals, NumPy's rounded as ours are. LensKit:
    estimates, and NumPy's means of its resamples."""
    mine, library, arrays = out.values()
    ours, numpy = (np.load(path / "intervals.npy") for path in (mine, arrays))
    assert ours.shape == (3, len(ROWS), len(METRICS)) and (ours[1] < ours[0]).all()
    assert (ours[0] < ours[2]).all()
    numpy[1:] = numpy[1:].round(DECIMALS)
    differences = [
        np.abs(ours - numpy).max(),
        np.abs(ours[0] - np.load(library / "values.npy")).max(),
        np.abs(np.load(library / "means.npy") - np.load(arrays / "means.npy")).max(),
    ]
    assert max(differences) < 1e-12, differences
    return (
        f"The same estimates and intervals (to {DECIMALS} decimals) as NumPy's and the same "
        f"estimates and resampled means as LensKit's, to {max(differences):.0e}"
    )


def floor(inputs: Path) -> tuple[float, str]:
    """The draws alone: 10,000 × 6,040 of them make the result what it is."""
    n_users = len(np.load(inputs / "arrays.npz")["truth"])
    took = []
    for _ in range(3):
        rng = np.random.default_rng(SEED)
        started = time.perf_counter()
        for _ in range(RESAMPLES):
            rng.integers(0, n_users, n_users)
        took.append(time.perf_counter() - started)
    return min(took), f"drawing {RESAMPLES * n_users:,} users with NumPy's generator, nothing else"
