"""Sections of the report beside the metric table: the memorisation probe and leave-last-out.

What belongs here: their tables, each with what may be concluded under it. What does not: the
numbers (``memorisation``, ``leave_last_out``), the page around them (``report_page``).
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from llmrec_assets.ground.pages import Block, Cell, Paragraph, Table

#: Heading of a column: who answered, under which condition.
_ASKED = {
    "source": ("model", "source"),
    "control": ("model", "control"),
    "guessing": ("baseline", "source"),
}


def memorisation_section(table: pd.DataFrame | None) -> list[Block]:
    """``MEMORISATION``; ``None``: there is none of the current base model."""
    if table is None or table.empty:
        return [
            Paragraph(
                "Not materialized for this base model: whether it knew MovieLens' files cannot be "
                "said. Materialize memorisation."
            )
        ]
    share = {
        (r["task"], r["match"], r["answered_by"], r["condition"]): r
        for r in table.to_dict("records")
    }
    asked = list(dict.fromkeys(key[:2] for key in share))
    rows = [
        [
            Cell(f"{task}: {match}"),
            *(
                _share(share.get((*(task, match), *who)), ("share", "low", "high"))
                for who in _ASKED.values()
            ),
        ]
        for task, match in asked
    ]
    columns = [("", "asked for: what counts"), *(("", name) for name in _ASKED)]
    caption = "Questions about the files' rows answered, in per cent with exact intervals"
    return [Table(caption, columns, [("", rows)]), Paragraph(memorisation_words(table))]


def memorisation_words(table: pd.DataFrame) -> str:
    """What the probe shows, and what it does not."""
    model = table[table["answered_by"] == "model"]
    of = {
        condition: part.set_index(["task", "match"])
        for condition, part in model.groupby("condition")
    }
    both = [key for key in of["source"].index if key in of["control"].index]
    apart = [
        f"{task} ({match})"
        for task, match in both
        if of["source"].loc[(task, match), "low"] > of["control"].loc[(task, match), "high"]
    ]
    n = int(table["n"].max())
    told = (
        f"The intervals of source and control lie apart in: {', '.join(apart)}. There the base "
        "model may know the files, and its rows in this report, and those of every stage trained "
        "from it, may profit from that."
        if apart
        else "Nowhere does the interval of source lie above that of control: that the base model "
        f"knows the files by heart is not shown. With at most {n} questions a task it is not "
        "excluded either."
    )
    return (
        f"{told} A hit under control, which asks for the same rows under other ids, is of the "
        "format, not of memory; only source above control speaks of memory. Neighbours in the "
        "file resemble each other, so that next title may be guessed without knowing it. No test "
        "was made over the tasks together."
    )


def leave_last_out_section(table: pd.DataFrame | None) -> list[Block]:
    """``LEAVE_LAST_OUT``; ``None``: there is none."""
    if table is None or table.empty:
        return [Paragraph("Not materialized for this data set and recipe: leave_last_out.")]
    ks = sorted(table["k"].unique().tolist())
    columns = [("", "recommender"), ("", "setting")]
    columns += [(f"k = {k}", name) for k in ks for name in ("HR %", "NDCG %")]
    rows = []
    for (name, setting), part in table.groupby(["recommender", "setting"], sort=False):
        at = {row["k"]: row for row in part.to_dict("records")}
        cells = [
            _share(at.get(k), (metric, f"{metric}_low", f"{metric}_high"))
            for k in ks
            for metric in ("hr", "ndcg")
        ]
        rows.append([Cell(str(name)), Cell(str(setting)), *cells])
    caption = "The last film of every user among all they had not met, with intervals"
    return [Table(caption, columns, [("", rows)]), Paragraph(leave_last_out_words(table))]


def leave_last_out_words(table: pd.DataFrame) -> str:
    """What the protocol shows, and what it does not."""
    k = int(table["k"].max())
    ordered = table[table["k"] == k].sort_values("ndcg", ascending=False, kind="stable")
    best, *others = ordered.to_dict("records")
    near = [row["recommender"] for row in others if row["ndcg_high"] >= best["ndcg_low"]]
    told = f"Highest NDCG@{k}: {best['recommender']}"
    if others:
        told += (
            f"; the intervals of {', '.join(near)} overlap with its own"
            if near
            else "; no other interval overlaps with its own"
        )
    return (
        f"{told}. {int(best['n_users']):,} users, {int(best['n_items']):,} films. No difference "
        "was tested, and nothing here may be set beside the metric table: the question is another "
        "one, every user is also trained on, and recommenders learn from what others rated later. "
        "Settings were chosen on the last film but one from a grid of their own, not from that "
        "of the classical rows above. The LLM has no row: its training windows may hold a user's "
        "last film. Films rated at one sitting make “last” partly the order of a web page."
    )


def _share(row: Any, names: tuple[str, str, str]) -> Cell:
    if row is None:
        return Cell("")
    share, low, high = (100 * row[name] for name in names)
    return Cell(f"{share:.2f}", f"[{low:.2f}, {high:.2f}]", "number")
