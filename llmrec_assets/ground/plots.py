"""Small plots for metadata and reports, as PNG bytes.

What belongs here: pictures of numbers. What does not: the numbers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence


def line_plot(points: Sequence[tuple[float, float]], *, x: str, y: str) -> bytes:
    """One line with a running mean over it, as PNG."""
    # The object interface needs no display and no global state; importing here keeps the code
    # location quick to load.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), dpi=100, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    axes.plot(xs, ys, color="#9db4c0", linewidth=1)
    if len(ys) >= 10:
        window = max(3, len(ys) // 10)
        means = [
            sum(ys[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(ys))
        ]
        axes.plot(xs, means, color="#253237", linewidth=1.6, label=f"mean of {window}")
        axes.legend(frameon=False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
