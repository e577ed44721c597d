"""Our metrics are another library's, to 1e-9: LensKit's, on random lists."""

from __future__ import annotations

import numpy as np
import pytest

from llmrec_assets.ground import metrics

lenskit = pytest.importorskip("lenskit.metrics")


def test_metrics_equal_lenskits_on_random_lists() -> None:
    from lenskit.data import ItemList
    from lenskit.metrics import NDCG, LogRankWeight, Precision, Recall

    rng = np.random.default_rng(11)
    for _ in range(400):
        k = int(rng.integers(1, 11))
        films = rng.permutation(30)[:k].tolist()
        truth = rng.permutation(30)[: int(rng.integers(1, 13))].tolist()
        # an empty slot is an item of no catalogue there: it keeps its rank and is no hit
        slots = [None if rng.random() < 0.2 else film for film in films]
        items = [-rank if film is None else film for rank, film in enumerate(slots, start=1)]
        gains = metrics.slot_gains(slots, truth, seen=())
        theirs = ItemList(items, ordered=True), ItemList(truth)
        # LensKit discounts by log2(rank) unless told the usual log2(rank + 1), and divides Recall
        # by at most k: the same where the ground truth is the next k films, as in every window
        at_most_k = len(truth) / min(k, len(truth))
        for ours, other in (
            (metrics.ndcg(gains, len(truth)), NDCG(n=k, weight=LogRankWeight(offset=1))),
            (metrics.precision(gains, len(truth)), Precision(n=k)),
            (metrics.recall(gains, len(truth)) * at_most_k, Recall(n=k)),
        ):
            assert abs(ours - other.measure_list(*theirs)) <= 1e-9, (other, slots, truth)
