"""Confidence intervals of means over users.

What belongs here: the bootstrap. What does not: what is averaged (``evaluation``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: How often each user is drawn, held at once: bounds memory at about 30 MB.
_DRAWS_AT_ONCE = 4_000_000
_DRAWN_TOGETHER = 64
#: What is kept of an interval's ends: far below what the draws can tell, far above what the order
#: of a product's sums can move, which changes with the processor and its threads.
DECIMALS = 9


def bootstrap_means(
    values: Floats,
    resamples: int,
    seed: int,
    confidence: float,
    signed: NDArray[np.bool_] | None = None,
) -> tuple[Floats, Floats, Floats]:
    """Percentile bootstrap of column means over users (Efron & Tibshirani, 1993, ch. 13).

    Users are drawn with replacement, so a row must hold all there is about a user: several
    windows of one user are averaged before they come here. All columns share the same draws,
    which makes their differences paired; the same seed and number of users give the same draws
    in another call too.

    A column of zeros has no spread to resample and would get [0, 0], as if the mean were known.
    There the exact upper limit on the share of users that are not zero stands instead,
    ``1 - (alpha / 2) ** (1 / n_users)`` (Clopper & Pearson, 1934, zero successes): as values are
    at most 1 in size, it bounds the mean too. A signed column of zeros gets it on both sides.

    Args:
        values: [n_users, n_columns], each in [0, 1], or in [-1, 1] where signed.
        resamples: bootstrap resamples.
        seed: seed of the draws.
        confidence: e.g. 0.95 for a two-sided 95 % interval.
        signed: [n_columns], true for columns of differences; ``None``: none is.

    Returns:
        mean, low and high, each [n_columns]; low and high to nine decimals.

    Raises:
        ValueError: there is no user.
    """
    n_users = len(values)
    if n_users == 0:
        raise ValueError("an interval needs at least one user, got none")
    alpha = 1 - confidence
    means = _resampled_means(values, resamples, seed)
    mean = values.mean(axis=0)
    ends = np.round(np.quantile(means, [alpha / 2, 1 - alpha / 2], axis=0), DECIMALS)
    # a column without spread: rounded, its ends could miss its mean
    low, high = np.where(np.abs(ends - mean) < 10.0**-DECIMALS, mean, ends)
    zero = ~values.any(axis=0)
    bound = 1 - (alpha / 2) ** (1 / n_users)
    high = np.where(zero, bound, high)
    if signed is not None:
        low = np.where(zero & signed, -bound, low)
    return mean, low, high


def _resampled_means(values: Floats, resamples: int, seed: int) -> Floats:
    """[resamples, n_columns], in chunks; the draws do not depend on the chunks' size."""
    n_users, n_columns = values.shape
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, n_columns))
    chunk = max(1, _DRAWS_AT_ONCE // n_users)
    counts = np.empty((min(chunk, resamples), n_users))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        for first in range(0, size, _DRAWN_TOGETHER):
            some = min(_DRAWN_TOGETHER, size - first)
            # counted one by one: a resample's counts stay in the processor's cache
            for resample, drawn in enumerate(rng.integers(0, n_users, size=(some, n_users)), first):
                counts[resample] = np.bincount(drawn, minlength=n_users)
        means[start : start + size] = counts[:size] @ values / n_users
    return means
