"""The report of one run: what it says.

What belongs here: which tables, sentences and pictures the report has. What does not: what they
look like in Markdown and HTML, escaping included (``pages``), computing figures (``evaluation``),
formatting the metric table's cells (``report``), drawing curves (``plots``), the paper's figures
(``published``), the sections on comparisons, lists and groups (``report_sections``), on the
probe and leave-last-out (``report_probes``), and what may be concluded (``conclusions``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from llmrec_assets.ground.conclusions import verdict
from llmrec_assets.ground.pages import (
    Block,
    Cell,
    Heading,
    Paragraph,
    Picture,
    Pictures,
    Table,
    render_html,
    render_markdown,
)
from llmrec_assets.ground.published import PUBLISHED, SOURCE, PublishedTable
from llmrec_assets.ground.recipes import HYBRID
from llmrec_assets.ground.recommendations import STAGE_ORDER, stage_key
from llmrec_assets.ground.report import readable, row_labels, row_of
from llmrec_assets.ground.report_probes import leave_last_out_section, memorisation_section
from llmrec_assets.ground.report_sections import forest, protocol_sections

#: What the four stages rest on, in order; what has no facts is shown as missing.
_EXPECTED = (
    "sft_checkpoint",
    "preference_pairs",
    "dpo_checkpoint",
    "reward_model",
    "rlhf_checkpoint",
)
#: Shown in a section of their own.
_PAIR_FACTS = ("sampled_responses", "preference_pairs")
_METRICS = ("NDCG", "Precision", "Recall")
_HYBRID_WORDS = (
    f"`{HYBRID}` is a hybrid: EASE, fitted on training users and told what the prompt shows, "
    "proposes films, and the LLM orders them. Its hits are not the LLM's alone, whatever it beats; "
    "what the LLM adds is its difference to `ease` under the same information set."
)
_SHOWN_BEFORE_STAGES = ("liked", "disliked", "ground truth")


@dataclass(frozen=True)
class Curve:
    """A picture of a training, as PNG bytes."""

    title: str
    png: bytes


@dataclass(frozen=True)
class Report:
    """``html`` stands alone. ``markdown`` shows ``files``: path relative to it → bytes."""

    markdown: str
    html: str
    files: dict[str, bytes]


def build_report(
    *,
    dataset: str,
    recipe_name: str,
    base_model: str,
    metric_table: pd.DataFrame,
    comparisons: pd.DataFrame,
    beyond_accuracy: pd.DataFrame,
    group_metrics: pd.DataFrame,
    confidence: float,
    sample_recommendations: pd.DataFrame,
    memorisation: pd.DataFrame | None,
    leave_last_out: pd.DataFrame | None,
    facts: Mapping[str, Mapping[str, Any]],
    curves: Sequence[Curve],
    generated: Mapping[str, str],
) -> Report:
    """The report of one data set and recipe (paper Tables 1 to 3, published figures beside ours).

    Args:
        dataset: partition key; only ``published.PUBLISHED`` has figures to stand beside.
        base_model: its label.
        metric_table: ``METRIC_TABLE``; a stage it lacks is named as missing.
        comparisons: ``COMPARISONS``; every claim about a difference rests on it.
        beyond_accuracy: ``BEYOND_ACCURACY``.
        group_metrics: ``GROUP_METRICS``.
        confidence: of the intervals; 1 - confidence is the level of the comparisons.
        sample_recommendations: ``SAMPLE_RECOMMENDATIONS``.
        memorisation: ``MEMORISATION``; ``None``: the report says that there is none.
        leave_last_out: ``LEAVE_LAST_OUT``; likewise.
        facts: asset → what is known of it, JSON values; a checkpoint or ``preference_pairs`` that
            is absent is named as missing. ``version``, ``seconds`` and ``run_id``
            get columns of their own; a long list is counted, not shown.
        curves: in the order they are shown.
        generated: when, by what commit, on what machine: shown under the title.
    """
    told = "".join(f" {name}: {value}." for name, value in generated.items())
    blocks: list[Block] = [
        Paragraph(f"Data set {dataset}, recipe {recipe_name}, base model {base_model}.{told}")
    ]
    published = PUBLISHED.get(dataset)
    table_1 = "Table 1" if published is None else published.name
    protocols = list(metric_table.groupby("protocol", sort=True)) or [("", metric_table)]
    for protocol, part in protocols:
        where = f" ({protocol})" if len(protocols) > 1 else ""
        told = verdict(part, comparisons[comparisons["protocol"] == protocol])
        blocks += [Heading(f"Verdict{where}"), Paragraph(told, lead=True)]
        blocks.append(Heading(f"{table_1}: the stages{where}"))
        blocks += _stages(part, dataset, published, _slug(where))
        blocks += protocol_sections(
            str(protocol), part, comparisons, beyond_accuracy, group_metrics, confidence, where
        )
    blocks += [Heading("Table 2: one user through the stages"), *_one_user(sample_recommendations)]
    blocks += [Heading("Memorisation"), *memorisation_section(memorisation)]
    blocks += [Heading("Leave-last-out"), *leave_last_out_section(leave_last_out)]
    blocks += [Heading("Preference pairs"), *_pairs(facts)]
    pictures = _pictures(curves)
    blocks.append(Heading("Curves"))
    blocks.append(Pictures(pictures) if pictures else Paragraph("Missing: no curve was given."))
    blocks += [Heading("How it was made"), *_made(facts, metric_table)]
    title = f"Recommendations by a language model: {dataset}, {recipe_name}"
    return Report(
        markdown=render_markdown(title, blocks),
        html=render_html(title, blocks),
        files={
            picture.path: picture.png
            for block in blocks
            if isinstance(block, Pictures)
            for picture in block.pictures
        },
    )


def _records(metric_table: pd.DataFrame) -> list[dict[str, Any]]:
    """The table's rows in training order, each with ``label``, what a reader calls it, and
    ``shown``, its cells as text."""
    rows = [{str(name): v for name, v in r.items()} for r in metric_table.to_dict("records")]
    labels = row_labels(metric_table)
    for row, shown in zip(rows, readable(metric_table).to_dict("records"), strict=True):
        row["label"] = labels[row_of(row)]
        row["shown"] = shown
    return sorted(rows, key=lambda row: (*stage_key(row["stage"]), row["label"]))


def _column(metric: str, row: Mapping[str, Any]) -> str:
    return f"{metric}@{row['k']} %"


def _stages(
    metric_table: pd.DataFrame, dataset: str, published: PublishedTable | None, slug: str
) -> list[Block]:
    """Table 1 (or 3): LLM stages, then classical rows; then the intervals and the validity."""
    rows = _records(metric_table)
    k = rows[0]["k"] if rows else 5
    columns = [("", "stage"), ("", "users"), ("", "hits / slots")]
    for name in _METRICS:
        columns.append((f"{name}@{k} %", "ours"))
        columns += [(f"{name}@{k} %", "published")] if published else []
    columns.append(("", f"NDCG@{k} difference, points"))
    columns += [("", "MAP %, published")] if published else []

    models = []
    for stage in STAGE_ORDER:
        mine = [row for row in rows if row["stage"] == stage]
        models += [_stage_cells(stage, row, published) for row in mine]
        models += [] if mine else [_stage_cells(stage, None, published)]
    others = [row for row in rows if row["stage"] not in STAGE_ORDER]
    sections = [("Language model", models)]
    if others:
        cells = [_stage_cells(row["stage"], row, published) for row in others]
        sections.append(("Classical recommenders, same users", cells))
    blocks: list[Block] = [
        Table("Means over test users with intervals, in per cent", columns, sections)
    ]
    blocks += forest(metric_table, slug)
    blocks += [Paragraph(line) for line in _notes(dataset, published)]
    if any(row["decoding"] == HYBRID for row in rows):
        blocks.append(Paragraph(_HYBRID_WORDS))
    if rows:
        blocks.append(_validity(rows))
    return blocks


def _stage_cells(
    stage: str, row: Mapping[str, Any] | None, published: PublishedTable | None
) -> list[Cell]:
    """A row of Table 1; ``row`` is None where the metric table lacks the stage."""
    # the paper's answers are free text; its figures stand beside no other decoding
    own = row is None or row["decoding"] == "free"
    theirs = _published(published, stage if own else "")
    if row is None:
        cells = [Cell(stage), Cell("missing", kind="number refused"), Cell("")]
    else:
        cells = [Cell(row["label"])]
        cells += [Cell(str(row["shown"][name]), kind="number") for name in ("users", "hits")]
    for name in _METRICS:
        ours = "" if row is None else row["shown"][_column(name, row)]
        cells.append(_figure(ours))
        cells += [Cell(theirs[name], kind="number published")] if published else []
    cells.append(_figure("" if row is None else row["shown"]["NDCG difference"]))
    return cells + ([Cell(theirs["MAP"], kind="number published")] if published else [])


def _figure(shown: str) -> Cell:
    """An estimate with its interval as the note: under it in HTML, beside it in Markdown."""
    estimate, _, interval = shown.partition(" ")
    return Cell(estimate, interval, "number")


def _published(table: PublishedTable | None, stage: str) -> dict[str, str]:
    """The published cells of a stage, in per cent; every gap says what it is."""
    names = (*_METRICS, "MAP")
    if table is None or stage not in STAGE_ORDER:
        return dict.fromkeys(names, "")
    row = table.rows.get(stage)
    if row is None:
        return dict.fromkeys(names, "not published")
    values = {name: getattr(row, name.lower()) for name in names}
    return {name: _published_value(value) for name, value in values.items()}


def _published_value(value: float | None) -> str:
    if value is None:
        return "not found"
    return "NaN" if math.isnan(value) else f"{100 * value:.2f}"


def _notes(dataset: str, published: PublishedTable | None) -> list[str]:
    ours = (
        "In brackets: percentile bootstrap over users at the recipe's confidence; a row without "
        "a hit has the exact upper bound instead. Differences are paired by user. An item that is "
        "not in the catalogue, repeats or was already seen is a miss that keeps its rank. "
        "Lists other than free text and `ranking-shown` leave out every film rated by the cut-off."
    )
    if published is None:
        return [ours, f"No published figures are comparable: the paper has none for {dataset}."]
    hits = [
        f"{round(row.precision * published.slots())} hits in {published.slots()} slots ({stage})"
        for stage, row in published.rows.items()
        if row.precision is not None
    ]
    return [
        ours,
        f"Published: the paper's {published.name} as found in {SOURCE}; “not found” means that no "
        f"public figure was found, not that there is none. On {published.n_users} users its "
        f"Precision amounts to {', '.join(hits)}. {' '.join(published.remarks)}",
    ]


def _validity(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = ("decoding", "sees", "parsable %", "in catalogue %", "duplicate %", "seen %")
    cells = [
        [Cell(row["label"])]
        + [Cell(row["shown"][name], kind="number" if "%" in name else "") for name in names]
        for row in rows
    ]
    return Table(
        "What the slots hold, in per cent of all slots",
        [("", "stage"), *(("", name) for name in names)],
        [("", cells)],
    )


def _one_user(sample: pd.DataFrame) -> list[Block]:
    """Paper Table 2: what the user rated, what they liked next, and each stage's list."""
    if sample.empty:
        return [Paragraph("Missing: no stage has recommendations to show.")]
    lists: dict[str, list[Cell]] = {}
    ordered = sample.sort_values("rank", kind="stable")
    for name, text, title, hit in zip(
        *(ordered[column] for column in ("row", "text", "title", "is_hit")), strict=True
    ):
        lists.setdefault(name, []).append(_slot(_text(text), _text(title), bool(hit)))
    context = [lists.pop(name, []) for name in _SHOWN_BEFORE_STAGES]
    named = {name.split(" (")[0] for name in lists}
    lists |= {
        stage: [Cell("missing", kind="refused")] for stage in STAGE_ORDER if stage not in named
    }

    by_rank = [
        [
            Cell(str(rank + 1)),
            *(films[rank] if rank < len(films) else Cell("") for films in context),
        ]
        for rank in range(max(map(len, context)))
    ]
    width = max(map(len, lists.values()))
    by_stage = [
        [Cell(name), *lists[name], *[Cell("")] * (width - len(lists[name]))]
        for name in sorted(lists, key=lambda name: (*stage_key(name.split(" (")[0]), name))
    ]
    user, window = sample["user_id"].iloc[0], sample["window_index"].iloc[0]
    return [
        Paragraph(f"User {user}, window {window}; ✓ is a hit, → the film a text was taken for."),
        Table(
            "What the prompt showed, and what the user liked next",
            [("", "rank"), *(("", name) for name in _SHOWN_BEFORE_STAGES)],
            [("", by_rank)],
        ),
        Table(
            "What each stage recommended",
            [("", "stage"), *(("", str(rank + 1)) for rank in range(width))],
            [("", by_stage)],
        ),
    ]


def _slot(text: str, title: str, hit: bool) -> Cell:
    if not text and not title:
        return Cell("—", "(empty slot)", "refused")
    if not title:
        return Cell(text, "(not in the catalogue)", "refused")
    taken_for = f"→ {title}" if text and text != title else ""
    return Cell(("✓ " if hit else "") + (text or title), taken_for, "hit" if hit else "")


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value)


def _pairs(facts: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    blocks: list[Block] = []
    for asset in _PAIR_FACTS:
        if asset in facts:
            rows = [[Cell(name), Cell(_value(v))] for name, v in facts[asset].items()]
            blocks.append(Table(asset, [("", "fact"), ("", "value")], [("", rows)]))
        elif asset in _EXPECTED:
            blocks.append(Paragraph(f"{asset}: missing."))
    return blocks


def _pictures(curves: Sequence[Curve]) -> list[Picture]:
    """Each with a file name of its own, from its title."""
    pictures: list[Picture] = []
    taken: set[str] = set()
    for curve in curves:
        slug = _slug(curve.title).strip("-")[:60] or "curve"
        path, n = f"curves/{slug}.png", 1
        while path in taken:
            n += 1
            path = f"curves/{slug}-{n}.png"
        taken.add(path)
        pictures.append(Picture(curve.title, curve.png, path))
    return pictures


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).rstrip("-")


def _made(facts: Mapping[str, Mapping[str, Any]], metric_table: pd.DataFrame) -> list[Block]:
    """Versions, seconds and runs; then every other fact, folded in HTML."""
    names = [*_EXPECTED, *(asset for asset in facts if asset not in _EXPECTED)]
    own = ("version", "seconds", "run_id")
    rows, rest = [], []
    for asset in names:
        known = facts.get(asset)
        if known is None:
            rows.append([Cell(asset), Cell("missing", kind="refused"), Cell(""), Cell("")])
            continue
        version, seconds, run = (_value(known.get(name)) for name in own)
        rows.append([Cell(asset), Cell(version), Cell(seconds, kind="number"), Cell(run)])
        if asset not in _PAIR_FACTS:
            rest += [
                [Cell(asset), Cell(name), Cell(_value(value))]
                for name, value in known.items()
                if name not in own
            ]
    columns = [("", "asset"), ("", "version"), ("", "seconds"), ("", "run")]
    blocks: list[Block] = [Table("Versions and runs", columns, [("", rows)])]
    for prompts in metric_table["prompts_version"].drop_duplicates():
        blocks.append(Paragraph(f"All rows of the metric table answered prompts {prompts}."))
    if rest:
        columns = [("", "asset"), ("", "fact"), ("", "value")]
        blocks.append(Table("Everything else that was noted", columns, [("", rest)], folded=True))
    return blocks


def _value(value: Any) -> str:
    """A fact for a cell. A long one (losses, user ids) is counted: curves show it."""
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    told = json.dumps(value, ensure_ascii=False)
    return told if len(told) <= 200 else f"{len(value)} values, not shown here"
