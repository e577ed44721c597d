"""Is a paired difference more than chance: p-values, their correction, and the users it takes.

What belongs here: tests over users of numbers that are paired by user. What does not: intervals
(``intervals``), and which rows are compared (``comparisons``).
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Up to so many users that differ, every assignment of signs is looked at (2 ** 14 of them).
EXACT_USERS = 14
#: Signs held at once, which bounds memory at about 30 MB.
_SIGNS_AT_ONCE = 4_000_000
#: Sums of the same numbers in another order differ by rounding; they are ties.
_TIE = 1e-9


def sign_flip_p_values(differences: Floats, flips: int, seed: int) -> Floats:
    """Two-sided sign-flip permutation p-values of column means (Fisher, 1935, §21).

    Under the hypothesis that a user's two scores are exchangeable, the sign of their difference is
    a coin toss. The statistic is the size of the mean, ties count as extreme. A user without a
    difference adds nothing whatever the sign; where at most ``EXACT_USERS`` differ all
    assignments are enumerated and the p-value is exact. Otherwise ``flips`` seeded ones are
    drawn, and p = (b + 1) / (flips + 1) with b of them at least as extreme (Phipson & Smyth,
    2010), so that no p-value is zero. All columns share the draws.

    Args:
        differences: [n_users, n_columns], one row a user (several windows of one are averaged).
        flips: drawn assignments, at least 10,000 for a p-value that is to be corrected.
        seed: seed of the draws.

    Returns:
        [n_columns], each in (0, 1]; 1 for a column of zeros.

    Raises:
        ValueError: ``flips`` is not positive.
    """
    if flips < 1:
        raise ValueError(f"a permutation test needs at least one flip, got {flips}")
    n_differ = (differences != 0).sum(axis=0)
    p = np.ones(differences.shape[1])
    for column in np.flatnonzero((n_differ > 0) & (n_differ <= EXACT_USERS)):
        values = differences[differences[:, column] != 0, column]
        p[column] = _exact_p(values)
    drawn = np.flatnonzero(n_differ > EXACT_USERS)
    if len(drawn):
        b = _count_extreme(differences[:, drawn], flips, seed)
        p[drawn] = (b + 1) / (flips + 1)
    return p


def _exact_p(values: Floats) -> float:
    """Over all 2^n assignments of signs to ``values``, the observed one among them."""
    bits = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1
    sums = np.abs((1.0 - 2.0 * bits) @ values)
    return float((sums >= abs(values.sum()) - _TIE * np.abs(values).sum()).mean())


def _count_extreme(differences: Floats, flips: int, seed: int) -> NDArray[np.int64]:
    """[n_columns], drawn assignments with a sum at least as large as the observed one."""
    n_users = len(differences)
    rng = np.random.default_rng(seed)
    bar = np.abs(differences.sum(axis=0)) - _TIE * np.abs(differences).sum(axis=0)
    count = np.zeros(differences.shape[1], dtype=np.int64)
    chunk = max(1, _SIGNS_AT_ONCE // n_users)
    for start in range(0, flips, chunk):
        size = min(chunk, flips - start)
        # one bit a sign, and whole 32-bit words a flip, so that the chunks' size does not show
        noise = np.frombuffer(rng.bytes(size * 4 * -(-n_users // 32)), dtype=np.uint8)
        bits = np.unpackbits(noise.reshape(size, -1), axis=1, count=n_users)
        signs = 1.0 - 2.0 * bits.astype(np.float64)
        count += (np.abs(signs @ differences) >= bar).sum(axis=0)
    return count


def holm(p_values: Floats) -> Floats:
    """Holm's step-down correction (Holm, 1979): the chance of one false finding stays below the
    level whatever the hypotheses share.

    The i-th smallest of m is multiplied by m - i + 1; a larger one is never corrected to less, and
    none to more than 1.

    Returns:
        Corrected p-values in the order given.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.minimum(1.0, np.maximum.accumulate(p_values[order] * factors))
    result = np.empty(len(p_values))
    result[order] = corrected
    return result


def users_needed(
    difference: float, deviation: float, level: float, power: float = 0.8
) -> int | None:
    """Users by which a paired difference of this size would be seen, by the normal approximation.

    n = ((z(1 - level / 2) + z(power)) * deviation / difference)^2, rounded up (Cohen, 1988, ch. 2).
    The difference is the observed one: a guess at the true one, and an exaggerated one where it
    was picked because it looked large. The test behind it is a single one, uncorrected.

    Args:
        difference: mean over users.
        deviation: standard deviation of a user's difference.
        level: two-sided level of the test.
        power: chance to see it.

    Returns:
        At least 2; ``None`` where there is no difference to see, or none among so many users.
    """
    if difference == 0:
        return None
    z = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(power)
    n = math.ceil((z * deviation / difference) ** 2)
    return max(2, n) if n < 2**31 else None
