"""Sections of the report that stand on the comparisons, the lists and the groups.

What belongs here: their tables and pictures, each with its words under it. What does not: the
words (``conclusions``), the page around them (``report_page``), what blocks look like (``pages``).
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from llmrec_assets.ground.comparisons import POPULARITY, is_model
from llmrec_assets.ground.conclusions import (
    beyond_words,
    comparison_words,
    forest_words,
    group_words,
)
from llmrec_assets.ground.pages import Block, Cell, Heading, Paragraph, Picture, Pictures, Table
from llmrec_assets.ground.plots import Estimate, forest_plot
from llmrec_assets.ground.report import readable_pairs, row_labels, row_of

_REASONS = {
    "predecessor": "Each stage and the one it was trained from",
    "free decoding": "Each decoding and free text of the same stage",
    "proposer": "Each hybrid and EASE, whose films it ranks, in EASE's own order",
    "best classical": "Each row and the best classical one that sees as much",
    "popularity": "Each row and popularity",
}
_GROUPINGS = {
    "age": "By age",
    "gender": "By gender, as the source records it",
    "activity": "By activity: terciles of films rated by the cut-off",
    "ground truth popularity": "By popularity of the ground truth: terciles",
}


def forest(metric_table: pd.DataFrame, slug: str) -> list[Block]:
    """NDCG of all rows of one protocol with intervals, best first; ``slug`` names the file."""
    if metric_table.empty:
        return []
    k = metric_table["k"].iloc[0]
    title = f"NDCG@{k} in per cent with intervals, best first; broken lines: popularity"
    return [
        Pictures([Picture(title, forest_png(metric_table), f"figures/forest{slug}.png")]),
        Paragraph(forest_words(metric_table)),
    ]


def forest_png(metric_table: pd.DataFrame) -> bytes:
    """NDCG of all rows of one protocol with intervals, best first, as PNG."""
    labels, k = row_labels(metric_table), metric_table["k"].iloc[0]
    rows = [
        Estimate(
            labels[row_of(row)],
            estimate=100 * float(row["ndcg"]),
            low=100 * float(row["ndcg_low"]),
            high=100 * float(row["ndcg_high"]),
            is_model=is_model(row_of(row)),
        )
        for row in metric_table.to_dict("records")
    ]
    bars = {
        labels[row_of(row)]: 100 * float(row["ndcg"])
        for row in metric_table.to_dict("records")
        if row["stage"] == POPULARITY
    }
    return forest_plot(rows, bars, x=f"NDCG@{k} in per cent")


def comparison_section(
    comparisons: pd.DataFrame, labels: dict[Any, str], confidence: float
) -> list[Block]:
    """The comparisons of one protocol, by why they were made."""
    words = Paragraph(comparison_words(comparisons, confidence))
    if comparisons.empty:
        return [words]
    shown = readable_pairs(comparisons, labels)
    names = [name for name in shown.columns if name != "why"]
    sections = []
    for reason, heading in _REASONS.items():
        part = shown[shown["why"] == reason]
        if len(part):
            cells = [
                [_pair_cell(name, row[name], row["shown"] == "yes") for name in names]
                for row in part.to_dict("records")
            ]
            sections.append((heading, cells))
    columns = [("", name) for name in names]
    return [Table("Paired differences of NDCG in points, by user", columns, sections), words]


def _pair_cell(name: str, text: str, is_shown: bool) -> Cell:
    if name == "NDCG difference":
        estimate, _, interval = text.partition(" ")
        told = (" worse" if estimate.startswith("-") else " hit") if is_shown else ""
        return Cell(estimate, interval, f"number{told}")
    if name in ("row", "versus"):
        return Cell(text)
    return Cell(text, kind="refused" if text == "no" else "" if text == "yes" else "number")


def beyond_section(beyond: pd.DataFrame) -> list[Block]:
    """What the lists of one protocol are like, and what they cost."""
    words = Paragraph(beyond_words(beyond))
    if beyond.empty:
        return [words]
    labels = row_labels(beyond)
    columns = {
        "valid slots %": ("valid", 100, 0),
        "films": ("n_films", 1, 0),
        "coverage %": ("coverage", 100, 1),
        "novelty, bits": ("novelty", 1, 2),
        "popularity percentile": ("popularity", 100, 0),
        "genre diversity": ("diversity", 1, 2),
        "genre miscalibration": ("miscalibration", 1, 2),
        "tokens read": ("prompt_tokens", 1, 0),
        "tokens generated": ("response_tokens", 1, 0),
    }
    rows = [
        [Cell(labels[row_of(row)])]
        + [
            Cell(_number(row[name], scale, digits), kind="number")
            for name, scale, digits in columns.values()
        ]
        for row in beyond.to_dict("records")
    ]
    names = [("", "row"), *(("", name) for name in columns)]
    return [Table("What the lists are like; tokens per user", names, [("", rows)]),
            words]  # fmt: skip


def _number(value: Any, scale: int, digits: int) -> str:
    return "" if value is None or pd.isna(value) else f"{scale * value:,.{digits}f}"


def group_section(groups: pd.DataFrame, metric_table: pd.DataFrame) -> list[Block]:
    """NDCG by group of one protocol, a table for each grouping."""
    if groups.empty:
        return [Paragraph("Missing: no group has enough users.")]
    labels = row_labels(metric_table)
    blocks: list[Block] = []
    for grouping, heading in _GROUPINGS.items():
        part = groups[groups["grouping"] == grouping].sort_values("position", kind="stable")
        if part.empty:
            blocks.append(Paragraph(f"{heading}: no group has enough users."))
            continue
        heads = part[["group", "n_users"]].drop_duplicates("group")
        columns = [("", "row")] + [
            ("", f"{group} ({n} users)")
            for group, n in zip(heads["group"], heads["n_users"], strict=True)
        ]
        cells: dict[Any, list[Cell]] = {}
        for row in part.to_dict("records"):
            low, high = 100 * row["ndcg_low"], 100 * row["ndcg_high"]
            told = Cell(f"{100 * row['ndcg']:.2f}", f"[{low:.2f}, {high:.2f}]", "number")
            cells.setdefault(row_of(row), []).append(told)
        rows = [[Cell(labels[row]), *mine] for row, mine in cells.items() if row in labels]
        caption = f"{heading}: NDCG in per cent with intervals"
        blocks += [Table(caption, columns, [("", rows)], folded=len(rows) > 12),
                   Paragraph(group_words(part, metric_table))]  # fmt: skip
    return blocks


def protocol_sections(
    protocol: str,
    metric_table: pd.DataFrame,
    comparisons: pd.DataFrame,
    beyond: pd.DataFrame,
    groups: pd.DataFrame,
    confidence: float,
    where: str,
) -> list[Block]:
    """Comparisons, lists and groups of one protocol, headed; ``where`` is added to the heads."""

    def mine(table: pd.DataFrame) -> pd.DataFrame:
        return table[table["protocol"] == protocol]

    labels = row_labels(metric_table)
    return [
        Heading(f"Comparisons{where}"),
        *comparison_section(mine(comparisons), labels, confidence),
        Heading(f"Beyond accuracy{where}"),
        *beyond_section(mine(beyond)),
        Heading(f"For whom{where}"),
        *group_section(mine(groups), metric_table),
    ]
