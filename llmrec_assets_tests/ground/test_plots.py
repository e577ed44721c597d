"""Plots are PNG bytes; what is drawn is read off the axes."""

from __future__ import annotations

import io
import math
import struct

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from llmrec_assets.ground.plots import Estimate, curves_plot, forest_plot, histogram, line_plot


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


def size(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">2I", png[16:24])
    return width, height


@pytest.fixture
def saved(monkeypatch) -> list[Figure]:
    """Every figure saved."""
    figures = []
    save = Figure.savefig

    def record(self, *arguments, **options):
        figures.append(self)
        return save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


def test_a_histogram_counts_every_finite_value(saved):
    values = [0.0] * 7 + [0.5, 1.0, 1.0, math.nan, math.inf]
    png = histogram(values, x="NDCG@5", y="responses")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert size(png) == (600, 300)
    (axes,) = saved[0].axes
    bars = [(round(bar.get_x(), 6), int(bar.get_height())) for bar in axes.patches]
    assert [bar for bar in bars if bar[1]] == [(0.0, 7), (0.5, 1), (0.95, 2)]
    assert len(bars) == 20
    assert axes.get_title() == "10 responses, mean 0.25"
    assert list(axes.lines[0].get_xdata()) == [0.25, 0.25]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("NDCG@5", "responses")


def test_scores_that_are_all_zero_stand_at_zero(saved):
    histogram([0.0] * 5, x="NDCG@5", y="responses")
    (axes,) = saved[0].axes
    assert axes.patches[0].get_x() == pytest.approx(0)
    assert axes.patches[0].get_height() == 5
    assert axes.get_xlim()[0] > -0.1


@pytest.mark.parametrize("values", [[], [math.nan], [0.3]])
def test_a_histogram_of_hardly_anything(values):
    assert size(histogram(values, x="NDCG@5", y="responses")) == (600, 300)


@pytest.mark.parametrize(
    ("n", "shape"),
    [(0, (300, 220)), (1, (300, 220)), (2, (600, 220)), (3, (900, 220)), (7, (900, 660))],
)
def test_three_panels_to_a_row(n, shape):
    curves = {f"curve {i}": points(8) for i in range(n)}
    assert size(curves_plot(curves, "batch")) == shape


def test_every_curve_has_a_panel_of_its_own(saved):
    curves = {"reward": points(4), "KL": [(0, 1.0), (1, math.nan)], "loss": [], "late": points(30)}
    curves_plot(curves, "batch")
    panels = saved[0].axes
    assert [panel.get_title() for panel in panels] == list(curves)
    for panel, drawn in zip(panels, curves.values(), strict=True):
        np.testing.assert_array_equal(panel.lines[0].get_xydata(), np.reshape(drawn, (-1, 2)))
    # the step is named under the lowest panel of each column
    assert [panel.get_xlabel() for panel in panels] == ["", "batch", "batch", "batch"]


def test_a_forest_is_sorted_and_holds_every_interval_and_line(saved):
    rows = [
        Estimate("sft $x$", 1.0, 0.5, 2.0, True),
        Estimate("popularity", 5.0, 4.0, 6.0, False),
        Estimate("dpo", 3.0, 0.0, 7.0, True),
    ]
    png = forest_plot(rows, {"popularity": 5.0, "other": 4.5}, x="NDCG@5")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    (axes,) = saved[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "sft $x$", "dpo", "popularity",
    ]  # fmt: skip
    marks = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert marks["language model"] == [[1.0, 0.0], [3.0, 1.0]]
    assert marks["classical"] == [[5.0, 2.0]]
    assert [x for x, _ in marks["popularity"]] == [5.0, 5.0]
    whiskers = [segment.tolist() for c in axes.collections for segment in c.get_segments()]
    assert sorted(whiskers) == [
        [[0.0, 1.0], [7.0, 1.0]], [[0.5, 0.0], [2.0, 0.0]], [[4.0, 2.0], [6.0, 2.0]],
    ]  # fmt: skip
    assert axes.get_xlabel() == "NDCG@5"
    assert size(forest_plot(rows * 10, {}, x="NDCG@5"))[1] > size(png)[1]
