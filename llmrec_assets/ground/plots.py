"""Small plots for metadata and reports, as PNG bytes.

What belongs here: pictures of numbers. What does not: the numbers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

_LIGHT, _DARK = "#9db4c0", "#253237"
_PANELS_PER_ROW = 3
_BINS = 20


def line_plot(points: Points, *, x: str, y: str) -> bytes:
    """One line with a running mean over it, as PNG."""
    figure = _figure(6, 3)
    axes = figure.add_subplot()
    _curve(axes, points, legend=True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return _png(figure)


def curves_plot(curves: Mapping[str, Points], x: str) -> bytes:
    """Every named curve in a panel of its own, three to a row, as PNG.

    Panels share no axis: the curves of a training have nothing in common but their steps ``x``.
    """
    columns = max(1, min(_PANELS_PER_ROW, len(curves)))
    rows = max(1, math.ceil(len(curves) / columns))
    figure = _figure(3 * columns, 2.2 * rows)
    for position, (name, points) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(rows, columns, position)
        _curve(axes, points)
        axes.locator_params(axis="x", integer=True)
        axes.set_title(name, fontsize="medium")
        if position + columns > len(curves):  # nothing below it
            axes.set_xlabel(x)
    return _png(figure)


def histogram(values: Sequence[float], *, x: str, y: str) -> bytes:
    """How often values occur, with their mean, as PNG; values that are not finite are left out.

    ``y`` says what is counted, in the plural.
    """
    finite = [value for value in values if math.isfinite(value)]
    figure = _figure(6, 3)
    axes = figure.add_subplot()
    if finite:
        low, high = min(finite), max(finite)
        # values that are all alike would stand in the middle of a range that none of them has
        span = (low, high if high > low else low + 1)
        axes.hist(finite, bins=_BINS, range=span, color=_LIGHT, edgecolor="white")
        mean = math.fsum(finite) / len(finite)
        axes.axvline(mean, color=_DARK, linewidth=1.6)
        axes.set_title(f"{len(finite):,} {y}, mean {mean:.3g}", fontsize="medium")
    axes.locator_params(axis="y", integer=True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return _png(figure)


@dataclass(frozen=True)
class Estimate:
    """A row of a forest plot: an estimate between the ends of its interval."""

    label: str
    estimate: float
    low: float
    high: float
    is_model: bool


def forest_plot(rows: Sequence[Estimate], bars: Mapping[str, float], *, x: str) -> bytes:
    """Estimates with intervals, the largest on top, as PNG.

    Args:
        rows: in any order; language model and classical rows differ in colour and mark.
        bars: reference lines by name, each broken in its own way.
        x: what is estimated.
    """
    ordered = sorted(rows, key=lambda row: (row.estimate, row.high))
    figure = _figure(9, 1.3 + 0.27 * len(ordered))
    axes = figure.add_subplot()
    for kind, (colour, marker, name) in _KINDS.items():
        mine = [(y, row) for y, row in enumerate(ordered) if row.is_model is kind]
        if not mine:
            continue
        ys = [y for y, _ in mine]
        axes.hlines(ys, [r.low for _, r in mine], [r.high for _, r in mine], color=colour)
        axes.plot([r.estimate for _, r in mine], ys, marker, color=colour, label=name, zorder=3)
    for (name, value), style in zip(bars.items(), cycle(("--", ":", "-.")), strict=False):
        axes.axvline(value, color=_DARK, linewidth=1, linestyle=style, label=name, zorder=1)
    axes.set_yticks(range(len(ordered)), [row.label for row in ordered], parse_math=False)
    axes.set_ylim(-0.7, len(ordered) - 0.3)
    axes.set_xlim(left=0)
    axes.grid(axis="x", color="#e3e6e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(x)
    axes.legend(frameon=False, loc="lower right", fontsize="small")
    return _png(figure)


#: Colour, mark and name in the legend, by whether it is a row of the language model.
_KINDS = {True: ("#1f5f8b", "o", "language model"), False: ("#b3691a", "s", "classical")}


def _curve(axes: Axes, points: Points, *, legend: bool = False) -> None:
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    if len(ys) < 10:
        axes.plot(xs, ys, color=_DARK, linewidth=1.6, marker="o", markersize=3)
        return
    axes.plot(xs, ys, color=_LIGHT, linewidth=1)
    window = max(3, len(ys) // 10)
    means = [sum(ys[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(ys))]
    axes.plot(xs, means, color=_DARK, linewidth=1.6, label=f"mean of {window}")
    if legend:
        axes.legend(frameon=False)


def _figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches at 100 dots each."""
    # The object interface needs no display and no global state; importing here keeps the code
    # location quick to load.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="tight")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
