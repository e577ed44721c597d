"""p-values by enumeration and by drawing, Holm's correction and the power line, by hand."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_assets.ground import significance
from llmrec_assets.ground.significance import holm, sign_flip_p_values, users_needed


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


def test_few_users_are_enumerated_by_hand() -> None:
    # 3 + 2 + 1: of 8 sign assignments only +++ and --- reach 6
    assert sign_flip_p_values(column(3, 2, 1), 10, 0).tolist() == [2 / 8]
    # 3 + 2 - 1 = 4: reached by +++, ++- and their mirrors
    assert sign_flip_p_values(column(3, 2, -1), 10, 0).tolist() == [4 / 8]
    # nothing can be said of users that do not differ, however many
    assert sign_flip_p_values(column(*[0] * 500, 1, 1, 1), 10, 0).tolist() == [2 / 8]
    assert sign_flip_p_values(column(0, 0), 10, 0).tolist() == [1]


@given(st.lists(st.sampled_from([-0.63, -0.2, 0.0, 0.1, 0.3, 0.39]), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_the_enumeration_is_the_definition(values: list[float]) -> None:
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True)))
            for signs in product((1, -1), repeat=len(values))]  # fmt: skip
    expected = np.mean([s >= abs(sum(values)) - 1e-9 for s in sums])
    assert sign_flip_p_values(column(*values), 10, 0)[0] == pytest.approx(expected, abs=1e-12)


def test_drawn_p_values_are_near_the_binomial_tail() -> None:
    """Differences of one size make the test a sign test, whose p-value is a binomial tail."""
    values = np.repeat([1.0, -1.0, 0.0], [26, 14, 60])
    exact = 2 * sum(comb(40, i) for i in range(26, 41)) / 2**40
    (p,) = sign_flip_p_values(values[:, None], 20_000, 1)
    assert p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000))
    (least,) = sign_flip_p_values(np.ones((60, 1)), 10_000, 0)
    assert least == 1 / 10_001  # (b + 1) / (flips + 1): never zero


def test_chunks_do_not_show_and_columns_do_not_matter_to_each_other(monkeypatch) -> None:
    values = np.random.default_rng(0).normal(0.05, 0.3, (101, 3))
    whole = sign_flip_p_values(values, 2000, 7)
    assert sign_flip_p_values(values[:, [1]], 2000, 7)[0] == whole[1]
    assert sign_flip_p_values(-values, 2000, 7).tolist() == whole.tolist()
    monkeypatch.setattr(significance, "_SIGNS_AT_ONCE", 101 * 17)
    assert sign_flip_p_values(values, 2000, 7).tolist() == whole.tolist()
    assert sign_flip_p_values(values, 2000, 8).tolist() != whole.tolist()


def test_under_the_null_small_p_values_are_as_rare_as_they_say() -> None:
    noise = np.random.default_rng(3).normal(size=(80, 2000))
    p = sign_flip_p_values(noise, 2000, 0)
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.02)


def test_a_test_without_flips_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one flip"):
        sign_flip_p_values(column(1), 0, 0)


def test_holm_by_hand() -> None:
    """Four p-values: 0.005·4, 0.01·3, 0.03·2, 0.04·1 raised to the one before."""
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.5, 0.9])).tolist() == [1, 1]
    assert holm(np.array([])).tolist() == []


@given(st.lists(st.floats(0.0001, 1), min_size=1, max_size=20))
def test_holm_lies_between_the_p_value_and_bonferroni(values: list[float]) -> None:
    p = np.array(values)
    corrected = holm(p)
    assert (corrected >= p).all()
    assert (corrected <= np.minimum(1, p * len(p)) + 1e-12).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(corrected[order]) >= 0).all()


def test_users_needed_by_hand() -> None:
    """z(0.975) + z(0.8) = 1.95996 + 0.84162 = 2.80159, squared 7.84887."""
    assert users_needed(0.5, 1.0, 0.05) == 32  # 7.84887 / 0.25 = 31.4
    assert users_needed(0.01, 0.1, 0.05) == users_needed(-0.01, 0.1, 0.05) == 785
    assert users_needed(0.01, 0.1, 0.01) == 1168  # (2.57583 + 0.84162)^2 · 100 = 1167.9
    assert users_needed(0.01, 0.0, 0.05) == 2
    assert users_needed(0.0, 0.1, 0.05) is None
    assert users_needed(1e-12, 1.0, 0.05) is None


def test_so_many_users_see_it_as_often_as_promised() -> None:
    n = users_needed(0.3, 1.0, 0.05)
    rng = np.random.default_rng(5)
    studies = rng.normal(0.3, 1.0, (n, 600))
    p = sign_flip_p_values(studies, 1000, 0)
    assert (p <= 0.05).mean() == pytest.approx(0.8, abs=0.06)
