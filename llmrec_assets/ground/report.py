"""Tables for people: what the terminal and the UI show of the metric table.

What belongs here: choosing and formatting columns. What does not: computing them (``evaluation``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

from llmrec_assets.ground.recipes import HYBRID
from llmrec_assets.ground.recommendations import LIST_KEY, Row

#: Decodings whose name does not say whose merit a list is.
_TOLD = {HYBRID: f"{HYBRID} (hybrid: EASE proposes, the LLM orders)"}


#: Columns of ``readable`` that say how sound the lists are.
VALIDITY = ["parsable %", "in catalogue %", "duplicate %", "seen %"]


def readable(metric_table: pd.DataFrame) -> pd.DataFrame:
    """The metric table as text, in per cent with intervals.

    Args:
        metric_table: ``METRIC_TABLE``.

    Returns:
        One row per stage: list, users, hits, NDCG / Precision / Recall with their intervals,
        the paired NDCG difference with its corrected p-value, validity.
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
                "decoding": _TOLD.get(row["decoding"], row["decoding"]),
                "sees": row["information_set"],
                "users": row["n_users"],
                "hits": f"{row['hits']}/{row['n_windows'] * k}",
                f"NDCG@{k} %": _percent(row, "ndcg"),
                f"Precision@{k} %": _percent(row, "precision"),
                f"Recall@{k} %": _percent(row, "recall"),
                "NDCG difference": difference,
                "Holm p": p_value(row.get("ndcg_difference_p_holm")),
                "parsable %": f"{100 * row['parsable']:.0f}",
                "in catalogue %": f"{100 * row['in_catalogue']:.0f}",
                "duplicate %": f"{100 * row['duplicate']:.0f}",
                "seen %": f"{100 * row['seen']:.0f}",
            }
        )
    return pd.DataFrame(rows)


def readable_pairs(
    comparisons: pd.DataFrame, labels: Mapping[Row, str] | None = None
) -> pd.DataFrame:
    """``COMPARISONS`` as text, differences in points with intervals.

    Args:
        labels: what rows are called; ``None``: all that identifies them.
    """
    rows = []
    for row in comparisons.to_dict("records"):
        needed = row["users_needed"]
        rows.append(
            {
                "why": row["reason"],
                "row": _name(row_of(row), labels),
                "versus": _name(row_of(row, "versus_"), labels),
                "NDCG difference": _signed(row, "difference"),
                "p": p_value(row["p"]),
                "Holm p": p_value(row["p_holm"]),
                "shown": "yes" if row["is_shown"] else "no",
                "users": f"{row['n_users']:,}",
                "users that differ": f"{row['n_differ']:,}",
                "users needed": "" if pd.isna(needed) else f"{needed:,}",
            }
        )
    return pd.DataFrame(rows)


def _name(row: Row, labels: Mapping[Row, str] | None) -> str:
    return ", ".join(row) if labels is None else labels[row]


def row_of(record: Mapping[Any, Any], prefix: str = "") -> Row:
    """Stage, decoding and information set of a table's row."""
    stage, decoding, information_set = (str(record[f"{prefix}{name}"]) for name in LIST_KEY)
    return stage, decoding, information_set


def row_labels(table: pd.DataFrame) -> dict[Row, str]:
    """What a reader calls the rows of a table: the stage, and what tells its lists apart where it
    has several."""
    rows = list(dict.fromkeys(map(row_of, table[LIST_KEY].to_dict("records"))))
    lists = Counter(stage for stage, _, _ in rows)
    labels = {}
    for stage, decoding, information_set in rows:
        told = f"{decoding}, a hybrid" if decoding == HYBRID else decoding
        several = lists[stage] > 1 or decoding == HYBRID
        labels[stage, decoding, information_set] = stage + (
            f" ({told}, {information_set})" if several else ""
        )
    return labels


def p_value(value: Any) -> str:
    """Three decimals; "< 0.001" under them; nothing where there is none."""
    if value is None or pd.isna(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


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
