"""Exact intervals of shares.

What belongs here: what follows from counting hits among independent questions. What does not:
means over users (``intervals``).
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, fsum, lgamma, log


def clopper_pearson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval of a binomial share (Clopper & Pearson, Biometrika 26, 1934).

    Returns:
        (low, high), each in [0, 1]: the shares at which ``hits`` or more, and ``hits`` or fewer,
        would have probability (1 - confidence) / 2.

    Raises:
        ValueError: not 0 <= hits <= n with n >= 1.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"{hits} hits among {n} questions: expected 0 <= hits <= n, n >= 1")
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _root(lambda p: _tail(hits, n, n, p) - tail)
    high = 1.0 if hits == n else _root(lambda p: tail - _tail(0, hits, n, p))
    return low, high


def _tail(first: int, last: int, n: int, p: float) -> float:
    """Probability of ``first`` to ``last`` hits among ``n``, for 0 < p < 1."""
    return fsum(
        exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) + k * log(p) + (n - k) * log(1 - p))
        for k in range(first, last + 1)
    )


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function on (0, 1) crosses zero, by bisection to the last bit but a few."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
