import numpy as np
import pytest

from llmrec_assets.ground import intervals
from llmrec_assets.ground.intervals import bootstrap_means


def test_equals_plain_resampling() -> None:
    values = np.random.default_rng(1).random((40, 3))
    mean, low, high = bootstrap_means(values, 300, 5, 0.9)
    rng = np.random.default_rng(5)
    means = np.stack([values[rng.integers(0, 40, 40)].mean(axis=0) for _ in range(300)])
    assert mean == pytest.approx(values.mean(axis=0), abs=1e-12)
    ends = np.quantile(means, [0.05, 0.95], axis=0).round(intervals.DECIMALS)
    assert low == pytest.approx(ends[0], abs=1e-12)
    assert high == pytest.approx(ends[1], abs=1e-12)


def test_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(2).random((2000, 1))
    mean, low, high = bootstrap_means(values, 4000, 0, 0.95)
    error = 1.96 * values.std() / np.sqrt(2000)
    assert low[0] == pytest.approx(mean[0] - error, abs=error * 0.1)
    assert high[0] == pytest.approx(mean[0] + error, abs=error * 0.1)


def test_chunks_do_not_show(monkeypatch) -> None:
    values = np.random.default_rng(3).random((17, 2))
    whole = bootstrap_means(values, 50, 0, 0.95)
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 17 * 7)
    for one, other in zip(whole, bootstrap_means(values, 50, 0, 0.95), strict=True):
        assert one == pytest.approx(other, abs=1e-12)


def test_the_order_of_sums_does_not_show() -> None:
    """Another processor, or another number of threads, moves the last bits of the means."""
    values = np.random.default_rng(6).integers(0, 2, (50, 1)) / 3
    mean, low, high = bootstrap_means(values, 200, 0, 0.95)
    real = intervals._resampled_means

    def moved(*arguments) -> np.ndarray:
        return real(*arguments) * (1 + 2e-16 * np.random.default_rng(0).integers(-2, 3, (200, 1)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "_resampled_means", moved)
        assert [mean, low, high] == list(bootstrap_means(values, 200, 0, 0.95))
    constant = np.full((7, 1), 1 / 3)
    mean, low, high = bootstrap_means(constant, 100, 0, 0.95)
    assert low == mean == high


def test_columns_share_their_draws() -> None:
    first = np.random.default_rng(4).random(30)
    # paired with itself plus a constant, the difference has no spread at all
    values = np.column_stack([first, first / 2, first - (first / 2 + 0.1)])
    _, low, high = bootstrap_means(values, 200, 0, 0.95)
    alone = bootstrap_means(values[:, :1], 200, 0, 0.95)
    assert (low[0], high[0]) == (alone[1][0], alone[2][0])
    means = intervals._resampled_means(values, 200, 0)
    assert means[:, 1] == pytest.approx(means[:, 0] / 2, abs=1e-12)
    assert means[:, 2] == pytest.approx(means[:, 0] / 2 - 0.1, abs=1e-12)


def test_no_hit_at_all_still_has_an_upper_end() -> None:
    values = np.zeros((100, 2))
    mean, low, high = bootstrap_means(values, 100, 0, 0.95, signed=np.array([False, True]))
    bound = 0.036216693  # Clopper-Pearson for 0 of 100, from tables: 3.62 %
    assert mean.tolist() == [0, 0]
    assert low == pytest.approx([0, -bound], abs=1e-8)
    assert high == pytest.approx([bound, bound], abs=1e-8)


def test_a_hit_is_enough_for_the_bootstrap() -> None:
    values = np.zeros((50, 1))
    values[7] = 1
    mean, low, high = bootstrap_means(values, 2000, 0, 0.95)
    assert (mean[0], low[0]) == (0.02, 0)
    assert 0.04 <= high[0] <= 0.08


def test_nobody_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one user"):
        bootstrap_means(np.zeros((0, 1)), 10, 0, 0.95)
