"""Exact intervals against closed forms and against what defines them."""

from __future__ import annotations

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec_assets.ground.binomial import clopper_pearson


def test_no_hit_and_all_hits_have_closed_forms() -> None:
    bound = 1 - 0.025 ** (1 / 100)  # (1 - p) ** 100 = 0.025
    assert clopper_pearson(0, 100) == (0.0, pytest.approx(bound, abs=1e-12))
    assert clopper_pearson(100, 100) == (pytest.approx(1 - bound, abs=1e-12), 1.0)
    assert clopper_pearson(0, 1) == (0.0, pytest.approx(0.975))
    assert clopper_pearson(0, 1, confidence=0.9) == (0.0, pytest.approx(0.95))


def test_a_published_value() -> None:
    """5 of 10: 18.71 % to 81.29 %, in any table of exact 95 % limits."""
    assert clopper_pearson(5, 10) == (
        pytest.approx(0.1871, abs=5e-5),
        pytest.approx(0.8129, abs=5e-5),
    )


@given(st.integers(2, 60).flatmap(lambda n: st.tuples(st.integers(1, n - 1), st.just(n))))
def test_each_end_leaves_half_of_the_error_in_its_tail(case: tuple[int, int]) -> None:
    hits, n = case
    low, high = clopper_pearson(hits, n)

    def chance(p: float, ks: range) -> float:
        return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in ks)

    assert low < hits / n < high
    assert chance(low, range(hits, n + 1)) == pytest.approx(0.025, rel=1e-9)
    assert chance(high, range(hits + 1)) == pytest.approx(0.025, rel=1e-9)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_impossible_counts_are_refused(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= hits <= n"):
        clopper_pearson(hits, n)
