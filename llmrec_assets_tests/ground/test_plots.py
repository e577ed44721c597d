"""Plots are PNG bytes; what is drawn is read off the axes."""

from __future__ import annotations

import io
import math
import struct

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from llmrec_assets.ground.plots import line_plot


def points(n: int) -> list[tuple[float, float]]:
    return [(10 * i, (i % 7) / 7) for i in range(n)]


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[list, list]]:
    """(xs, ys) of every line plotted."""
    lines = []
    plot = Axes.plot

    def record(self, xs, ys, **style):
        lines.append((list(xs), list(ys)))
        return plot(self, xs, ys, **style)

    monkeypatch.setattr(Axes, "plot", record)
    return lines


@pytest.mark.parametrize("n", [0, 1, 2, 9, 10, 100])
def test_a_png_for_any_number_of_points(n):
    png = line_plot(points(n), x="step", y="loss")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert struct.unpack(">2I", png[16:24]) == (600, 300)
    assert imread(io.BytesIO(png)).shape[:2] == (300, 600)


def test_the_points_are_in_the_picture():
    empty, one, hundred = (
        imread(io.BytesIO(line_plot(points(n), x="step", y="loss"))) for n in (0, 2, 100)
    )
    assert not np.array_equal(empty, one)
    assert not np.array_equal(one, hundred)


def test_few_points_have_no_running_mean(drawn):
    line_plot(points(9), x="step", y="loss")
    assert drawn == [([10 * i for i in range(9)], [(i % 7) / 7 for i in range(9)])]


def test_the_running_mean_looks_back_over_a_tenth(drawn):
    line_plot([(i, float(i)) for i in range(50)], x="step", y="loss")
    (xs, ys), (mean_xs, means) = drawn
    assert xs == mean_xs
    assert ys == [float(i) for i in range(50)]
    # over the last 5 points, fewer at the start
    assert means[:5] == [0, 0.5, 1, 1.5, 2]
    assert means[5:] == [i - 2.0 for i in range(5, 50)]


def test_a_running_mean_spans_three_points_at_least(drawn):
    line_plot([(i, float(i)) for i in range(10)], x="step", y="loss")
    assert drawn[1][1] == [0, 0.5, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_loss_that_diverged_still_plots():
    png = line_plot([(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)], x="step", y="loss")
    assert png.startswith(b"\x89PNG")
