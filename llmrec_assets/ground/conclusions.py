"""What the numbers of a report allow to be said, in plain words.

What belongs here: sentences, each computed from the tables. What does not: the tables and pictures
they stand under (``report_sections``), and the numbers themselves.

"Shown" means one thing throughout: the sign-flip p-value, corrected by Holm over all comparisons,
is at most 1 - confidence (``comparisons.is_shown``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from llmrec_assets.ground.comparisons import POPULARITY, is_model, pair_keys
from llmrec_assets.ground.recommendations import STAGE_ORDER, Row
from llmrec_assets.ground.report import row_labels, row_of


def verdict(metric_table: pd.DataFrame, comparisons: pd.DataFrame) -> str:
    """What the rows of one protocol allow to be said, in one paragraph: what is missing, whether
    an LLM row beats popularity or the best classical row, whether training and decoding made a
    difference."""
    if metric_table.empty:
        return "No stage has been scored: the metric table is empty, so nothing can be said."
    labels = row_labels(metric_table)
    most = max(metric_table.to_dict("records"), key=lambda row: row["hits"])
    slots = int(most["n_windows"]) * int(most["k"])
    said = [
        f"{metric_table['n_users'].max()} test users; most hits: "
        f"{labels[row_of(most)]}, {most['hits']} in {slots} slots."
    ]
    stages = set(metric_table["stage"])
    said += [f"{stage} is missing." for stage in STAGE_ORDER if stage not in stages]
    said += _against_popularity(metric_table, comparisons, labels)
    models = comparisons[comparisons["stage"].isin(STAGE_ORDER)]
    pairs = models[models["reason"] == "best classical"]
    said += [_tally(pairs, "than the best classical row", labels)] if len(pairs) else []
    for reason, subject in (
        ("predecessor", "the stage they were trained from"),
        ("free decoding", "free text of the same stage"),
        ("proposer", "EASE's own order of the films that the hybrid ranks"),
    ):
        pairs = comparisons[comparisons["reason"] == reason]
        said += [_tally(pairs, f"than {subject}", labels)] if len(pairs) else []
    if not (comparisons["reason"] == "predecessor").any():
        said.append("No stage stands beside the one it was trained from.")
    return " ".join(said)


def _against_popularity(
    metric_table: pd.DataFrame, comparisons: pd.DataFrame, labels: Mapping[Row, str]
) -> list[str]:
    """For each popularity list, which LLM rows are shown to beat it, and which to be worse."""
    rows = {row_of(row): row for row in metric_table.to_dict("records")}
    popular = sorted((row for row in rows if row[0] == POPULARITY), key=labels.__getitem__)
    if not popular:
        return ["Popularity is not in the table: whether the LLM beats it cannot be said."]
    if not any(map(is_model, rows)):
        return ["No LLM stage is in the table."]
    told = []
    pairs = comparisons[
        (comparisons["reason"] == POPULARITY) & comparisons["stage"].isin(STAGE_ORDER)
    ]
    for bar in popular:
        mine = [pair for pair in pairs.to_dict("records") if row_of(pair, "versus_") == bar]
        name = f"{labels[bar]}, {100 * rows[bar]['ndcg']:.2f} % NDCG"
        better = _shown(mine, labels, 1)
        worse = _shown(mine, labels, -1)
        if not mine:
            told.append(f"Nothing was compared to {name}.")
            continue
        if better:
            told.append(f"Shown to beat {name}: {', '.join(better)}.")
        else:
            told.append(f"No LLM row is shown to beat {name}.")
        if worse:
            told.append(f"Shown to be worse than it: {', '.join(worse)}.")
        rest = len(mine) - len(better) - len(worse)
        told += [f"For {_rows(rest)} neither is shown."] if rest else []
    return told


def _rows(n: int) -> str:
    return "1 row" if n == 1 else f"{n} rows"


def _shown(pairs: Sequence[Mapping], labels: Mapping[Row, str], sign: int) -> list[str]:
    return [
        labels[row_of(pair)] for pair in pairs if pair["is_shown"] and sign * pair["difference"] > 0
    ]


def _tally(pairs: pd.DataFrame, than: str, labels: Mapping[Row, str]) -> str:
    records = pairs.to_dict("records")
    better, worse = _shown(records, labels, 1), _shown(records, labels, -1)
    parts = [f"Shown to be better {than}: {', '.join(better)}."] if better else []
    parts += [f"Shown to be worse {than}: {', '.join(worse)}."] if worse else []
    rest = len(records) - len(better) - len(worse)
    if rest == len(records):
        return f"No row is shown to be better or worse {than} ({_rows(rest)} compared)."
    return " ".join(parts + ([f"For {_rows(rest)} no difference is shown."] if rest else []))


def forest_words(metric_table: pd.DataFrame) -> str:
    """Under the forest plot of one protocol."""
    popular = metric_table[metric_table["stage"] == POPULARITY]
    told = (
        "Each row is judged by itself here. Intervals that overlap do not show that rows are "
        "alike, nor does one that clears the line show that they differ: rows share their users, "
        "and many are looked at. That is what the comparisons below are for."
    )
    if popular.empty:
        return told
    bar = popular["ndcg"].max()
    models = metric_table[metric_table["stage"].isin(STAGE_ORDER)]
    above, below = int((models["ndcg_low"] > bar).sum()), int((models["ndcg_high"] < bar).sum())
    k = metric_table["k"].iloc[0]
    return (
        f"Of {_rows(len(models))} of the LLM, {above} have an NDCG@{k} interval wholly above the "
        f"best popularity estimate, {below} wholly below it, {len(models) - above - below} hold "
        f"it. {told}"
    )


def comparison_words(comparisons: pd.DataFrame, confidence: float) -> str:
    """Under the comparisons of one protocol."""
    if comparisons.empty:
        return "Missing: no two rows could be compared."
    pairs = comparisons.assign(pair=pair_keys(comparisons)).drop_duplicates("pair")
    n, shown = int(comparisons["n_comparisons"].iloc[0]), int(pairs["is_shown"].sum())
    told = [
        f"{shown} of {len(pairs)} differences are shown at the level {1 - confidence:.2g}, after "
        f"Holm's correction over all {n} comparisons of this data set and recipe."
    ]
    rest = pairs[~pairs["is_shown"]]
    if len(rest):
        told.append(
            "A difference that is not shown is not shown to be absent: its interval says how large "
            "it may be either way."
        )
    alone = int((rest["p"] <= 1 - confidence).sum())
    if alone:
        told.append(
            f"{alone} would have been called significant by themselves; among so many comparisons "
            "some are expected by chance alone."
        )
    needed = rest["users_needed"].dropna()
    if len(needed):
        users = int(pairs["n_users"].max())
        more = int((needed > users).sum())
        told.append(
            f"Differences of the size observed here, if real, would take a median of "
            f"{int(needed.median()):,} users to be seen with 80 % power by one test alone; there "
            f"are {users:,}, too few for {more} of the {len(rest)} that are not shown."
        )
    return " ".join(told)


def beyond_words(beyond: pd.DataFrame) -> str:
    """Under the table of what lists are like."""
    if beyond.empty:
        return "Missing: no list was measured."
    labels = row_labels(beyond)
    told = []
    for column, what in (
        ("coverage", "recommends most of the catalogue"),
        ("novelty", "recommends the least known films"),
        ("miscalibration", "strays furthest from the genres its users liked"),
    ):
        known = beyond[beyond[column].notna()].to_dict("records")
        if known:
            most = max(known, key=lambda row: row[column])
            told.append(f"{labels[row_of(most)]} {what}")
    spread = "; ".join(told) + ". " if told else ""
    return (
        f"{spread}None of these is better for being larger: a random list is novel and diverse, "
        "and the list of a popularity ranking is neither and still hits. They describe the lists "
        "of these users; no difference between rows was tested. Only slots with a film that is "
        "neither repeated nor seen count: a row with few of them is described by few, and a short "
        "list can match the genres of a history less well."
    )


def group_words(groups: pd.DataFrame, metric_table: pd.DataFrame) -> str:
    """Under one grouping of one protocol."""
    left_out = int(groups["users_left_out"].max())
    best = max(metric_table.to_dict("records"), key=lambda row: row["ndcg"])
    mine = groups[[row_of(row) == row_of(best) for row in groups.to_dict("records")]]
    told = []
    if len(mine) > 1:
        ordered = mine.sort_values("ndcg", kind="stable").to_dict("records")
        low, high = ordered[0], ordered[-1]
        apart = low["ndcg_high"] < high["ndcg_low"]
        label = row_labels(metric_table)[row_of(best)]
        told.append(
            f"For the row with the highest NDCG, {label}, the intervals of "
            f"“{low['group']}” and “{high['group']}”, its furthest groups, "
            + (
                "do not overlap: a hint at a difference, not a test of one."
                if apart
                else "overlap: no difference between groups can be concluded."
            )
        )
    if left_out:
        told.append(f"{left_out} users are in no group shown: theirs is too small or unknown.")
    told.append("Groups were not drawn at random: a difference between them may have any cause.")
    return " ".join(told)
