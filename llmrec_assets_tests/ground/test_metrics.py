import doctest
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec_assets.ground import metrics
from llmrec_assets.ground.metrics import ndcg, precision, recall, slot_gains

IDS = st.integers(1, 8)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(metrics).failed == 0


@pytest.mark.parametrize(
    ("recommended", "truth", "seen", "gains"),
    [
        ([1, 2, 3, 4, 5], [1, 5], [], [1, 0, 0, 0, 1]),
        ([None, 1, None], [1], [], [0, 1, 0]),  # an empty slot keeps its rank
        ([1, 1, 2], [1, 2], [], [1, 0, 1]),  # a repeat is a miss
        ([3, 1], [1, 3], [3], [0, 1]),  # a seen film is a miss
        ([3, 3], [3], [3], [0, 0]),
        ([None, None], [1], [], [0, 0]),
    ],
)
def test_gains_by_hand(recommended, truth, seen, gains) -> None:
    assert slot_gains(recommended, truth, seen) == gains


def test_metrics_by_hand() -> None:
    gains = [0, 1, 0, 0, 1]
    ideal = 1 + 1 / 1.584962500721156 + 1 / 2
    expected = (1 / 1.584962500721156 + 1 / 2.584962500721156) / ideal
    assert ndcg(gains, 3) == pytest.approx(expected, abs=1e-12)
    assert precision(gains, 3) == 2 / 5
    assert recall(gains, 3) == 2 / 3
    assert ndcg([1, 1, 0], 2) == 1
    assert ndcg([1, 1, 1], 9) == 1  # the ideal list has k slots only


@given(st.lists(st.none() | IDS, min_size=1, max_size=8), st.sets(IDS, min_size=1), st.sets(IDS))
def test_metrics_equal_brute_force(recommended, truth, seen) -> None:
    dcg = hits = 0.0
    for position, movie_id in enumerate(recommended):
        if movie_id in truth - seen and movie_id not in recommended[:position]:
            dcg += log(2) / log(position + 2)
            hits += 1
    ideal = sum(log(2) / log(i + 2) for i in range(len(recommended)) if i < len(truth))
    gains = slot_gains(recommended, sorted(truth), seen)
    assert ndcg(gains, len(truth)) == pytest.approx(dcg / ideal, abs=1e-12)
    assert precision(gains, len(truth)) == pytest.approx(hits / len(recommended), abs=1e-12)
    assert recall(gains, len(truth)) == pytest.approx(hits / len(truth), abs=1e-12)
    assert 0 <= ndcg(gains, len(truth)) <= 1 + 1e-12


@pytest.mark.parametrize("metric", [ndcg, precision, recall])
def test_a_window_without_slots_or_truth_is_refused(metric) -> None:
    with pytest.raises(ValueError, match="at least one slot"):
        metric([], 1)
    with pytest.raises(ValueError, match="at least one ground truth"):
        metric([0], 0)
