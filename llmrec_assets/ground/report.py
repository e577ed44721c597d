"""Tables for people: what the terminal and the UI show of the metric table.

What belongs here: choosing and formatting columns. What does not: computing them (``evaluation``).
"""

from __future__ import annotations

from typing import Any

import pandas as pd


def readable(metric_table: pd.DataFrame) -> pd.DataFrame:
    """The metric table as text, in per cent with intervals.

    Args:
        metric_table: ``METRIC_TABLE``.

    Returns:
        One row per stage: list, users, hits, NDCG / Precision / Recall with their intervals,
        the paired NDCG difference, validity.
    """
    rows = []
    for row in metric_table.to_dict("records"):
        difference = ""
        if row["versus"] is not None and not pd.isna(row["versus"]):
            difference = f"{_signed(row, 'ndcg_difference')} vs {row['versus']}"
        k = row["k"]
        rows.append(
            {
                "stage": row["stage"],
                "decoding": row["decoding"],
                "sees": row["information_set"],
                "users": row["n_users"],
                "hits": f"{row['hits']}/{row['n_windows'] * k}",
                f"NDCG@{k} %": _percent(row, "ndcg"),
                f"Precision@{k} %": _percent(row, "precision"),
                f"Recall@{k} %": _percent(row, "recall"),
                "NDCG difference": difference,
                "parsable %": f"{100 * row['parsable']:.0f}",
                "in catalogue %": f"{100 * row['in_catalogue']:.0f}",
                "duplicate %": f"{100 * row['duplicate']:.0f}",
                "seen %": f"{100 * row['seen']:.0f}",
            }
        )
    return pd.DataFrame(rows)


def _percent(row: dict, name: str) -> str:
    low, high = 100 * row[f"{name}_low"], 100 * row[f"{name}_high"]
    return f"{100 * row[name]:.2f} [{low:.2f}, {high:.2f}]"


def _signed(row: dict, name: str) -> str:
    low, high = 100 * row[f"{name}_low"], 100 * row[f"{name}_high"]
    return f"{100 * row[name]:+.2f} [{low:+.2f}, {high:+.2f}]"


def markdown_table(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; text that came from a model or a user is escaped."""
    if frame.empty and not len(frame.columns):
        return "no rows"
    lines = [
        "| " + " | ".join(map(str, frame.columns)) + " |",
        "|" + "---|" * len(frame.columns),
    ]
    for row in frame.itertuples(index=False):
        lines.append("| " + " | ".join(_cell(value) for value in row) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return ""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    text = text if len(text) <= 300 else text[:300] + " …"
    text = " ⏎ ".join(text.splitlines())
    # Entities rather than backslashes: they mean the same to every Markdown renderer, also in code.
    escaped = "".join(_ESCAPED.get(character, character) for character in text)
    return escaped.replace("](", "]&#40;")


#: What could start markup, a picture or a new cell; a link needs "](", which ``_cell`` breaks.
_ESCAPED = {character: f"&#{ord(character)};" for character in "&<|\\`*_!~"}
