"""NDCG@k, Precision@k and Recall@k of one recommendation list (paper §4.1).

What belongs here: the definitions, for one window. What does not: tables of recommendations and
means over users (``evaluation``), intervals (``intervals``).

A list has k fixed slots. An empty, refused, repeated or already seen item is a miss that keeps
its rank: it neither shortens the list nor moves what follows up. Ids are canonical on both sides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import log2


def slot_gains(
    recommended: Sequence[int | None], ground_truth: Collection[int], seen: Collection[int]
) -> list[int]:
    """Gain of each slot: 1 for a hit, 0 for anything else.

    Args:
        recommended: k canonical movie ids, best first; ``None`` where nothing was grounded.
        ground_truth: canonical ids of the liked films that follow.
        seen: canonical ids rated by the cut-off.

    Returns:
        k gains, each 0 or 1.

    >>> slot_gains([7, 7, None, 3, 9], ground_truth=[7, 9, 3], seen={3})
    [1, 0, 0, 0, 1]
    """
    gains = []
    better: set[int] = set()
    for movie_id in recommended:
        hit = movie_id in ground_truth and movie_id not in seen and movie_id not in better
        gains.append(int(hit))
        if movie_id is not None:
            better.add(movie_id)
    return gains


def ndcg(gains: Sequence[int], n_ground_truth: int) -> float:
    """NDCG@k with binary gains, in [0, 1].

    DCG = Σ gain / log2(rank + 1); the ideal list hits in its first min(k, n_ground_truth) slots
    (Järvelin & Kekäläinen, 2002).

    Raises:
        ValueError: there is no slot or no ground truth.

    >>> round(ndcg([0, 1, 0, 0, 0], n_ground_truth=1), 4)
    0.6309
    """
    _require(gains, n_ground_truth)
    dcg = sum(gain / log2(rank + 1) for rank, gain in enumerate(gains, start=1))
    return dcg / ideal_dcg(len(gains), n_ground_truth)


def ideal_dcg(k: int, n_ground_truth: int) -> float:
    """DCG of the best list of k slots: a hit in each of the first min(k, n_ground_truth)."""
    return sum(1 / log2(rank + 1) for rank in range(1, min(k, n_ground_truth) + 1))


def precision(gains: Sequence[int], n_ground_truth: int) -> float:
    """Precision@k, in [0, 1]: hits over k, however short the answer was.

    Raises:
        ValueError: there is no slot or no ground truth.
    """
    _require(gains, n_ground_truth)
    return sum(gains) / len(gains)


def recall(gains: Sequence[int], n_ground_truth: int) -> float:
    """Recall@k, in [0, 1]: hits over the ground truth.

    Raises:
        ValueError: there is no slot or no ground truth.
    """
    _require(gains, n_ground_truth)
    return sum(gains) / n_ground_truth


def _require(gains: Sequence[int], n_ground_truth: int) -> None:
    if not gains:
        raise ValueError("a recommendation list has at least one slot, got none")
    if n_ground_truth < 1:
        raise ValueError(f"a window has at least one ground truth film, got {n_ground_truth}")
