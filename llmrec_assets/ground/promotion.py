"""Promotion: whether a challenger replaces its data set's champion, and the record of it.

What belongs here: the paired comparison on validation users, the decision, the rows of
``promotions``. What does not: what challenges and whether its inputs hold (``challengers``), the
champion's files (``champion``), answering (the models floor).

A challenger wins when the bootstrap interval of its NDCG@k minus the champion's, paired by user,
lies above minus the margin. Test users decide nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmrec_assets.ground.comparisons import user_scores
from llmrec_assets.ground.errors import DataError, StoreError
from llmrec_assets.ground.intervals import bootstrap_means
from llmrec_assets.ground.recipes import EvaluationRecipe
from llmrec_assets.ground.recommendations import typed
from llmrec_assets.ground.schemas import PROMOTIONS
from llmrec_assets.ground.stages import CHALLENGER, CHAMPION, CHAMPION_RECORD
from llmrec_assets.ground.store import Store, read_manifest


@dataclass(frozen=True)
class Side:
    """One of the two. ``test_ndcg``: NDCG@k on test users under this decoding, if measured."""

    version: str
    recipe: str
    stage: str
    decoding: str
    test_ndcg: float | None


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """One row of ``PROMOTIONS``: the same names, the same meanings."""

    decided_at: str
    decision: str
    reason: str
    challenger: str
    challenger_recipe: str
    challenger_stage: str
    challenger_decoding: str
    champion: str | None = None
    champion_recipe: str | None = None
    champion_stage: str | None = None
    champion_decoding: str | None = None
    in_force: str | None = None
    loser: str | None = None
    k: int | None = None
    n_users: int | None = None
    users_left_out: int | None = None
    ndcg_challenger: float | None = None
    ndcg_champion: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    margin: float | None = None
    confidence: float | None = None
    test_ndcg_challenger: float | None = None
    test_ndcg_champion: float | None = None
    prompts_version: str | None = None
    ratings_version: str | None = None
    run_id: str


def opened(challenger: Side, champion: Side | None, run_id: str, **facts: Any) -> Promotion:
    """A promotion that is not decided yet: it changes nothing.

    Args:
        facts: what else is known of its row by now.
    """
    before = None if champion is None else champion.version
    return Promotion(
        decided_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        decision="kept",
        reason="",
        challenger=challenger.version,
        challenger_recipe=challenger.recipe,
        challenger_stage=challenger.stage,
        challenger_decoding=challenger.decoding,
        champion=before,
        champion_recipe=None if champion is None else champion.recipe,
        champion_stage=None if champion is None else champion.stage,
        champion_decoding=None if champion is None else champion.decoding,
        in_force=before,
        loser=challenger.version,
        test_ndcg_challenger=challenger.test_ndcg,
        test_ndcg_champion=None if champion is None else champion.test_ndcg,
        run_id=run_id,
        **facts,
    )


def refused(promotion: Promotion, problems: Sequence[str]) -> Promotion:
    """A blocking check of the challenger failed."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return replace(promotion, decision="refused", reason=problems[0] + more)


def rolled_back(promotion: Promotion, reason: str) -> Promotion:
    """An earlier champion, ``challenger``, is in force again."""
    return replace(
        promotion,
        decision="rolled back",
        reason=reason,
        in_force=promotion.challenger,
        loser=promotion.champion,
    )


def without_opponent(promotion: Promotion) -> Promotion:
    """The champion has been trained on every validation user of the challenger: nobody is left
    who could compare them."""
    return replace(
        promotion,
        n_users=0,
        reason="the champion was trained on every validation user of the challenger, so they "
        "cannot be compared: give both recipes the same seed and splits",
    )


def judged(
    promotion: Promotion,
    metrics: pd.DataFrame,
    recipe: EvaluationRecipe,
    *,
    margin: float,
    seed: int,
) -> Promotion:
    """The decision by NDCG@k on validation users.

    Args:
        metrics: ``USER_METRICS`` of the stages ``CHALLENGER`` and, where there is one, ``CHAMPION``
            on the same windows.
        margin: loss that the interval must exclude, in [0, 1].
        seed: seed of the bootstrap.

    Raises:
        DataError: the two were scored on different users.
    """
    scores = {row[0]: values for row, values in user_scores(metrics).items()}
    challenger = scores[CHALLENGER]
    promotion = replace(
        promotion, n_users=len(challenger), ndcg_challenger=float(challenger.mean())
    )
    if CHAMPION not in scores:
        gone = promotion.champion
        why = f"champion {gone} is damaged, so there is none" if gone else "there is no champion"
        return replace(
            promotion,
            decision="first" if gone is None else "promoted",
            reason=f"{why} to compare with; every blocking check holds; NDCG@{promotion.k} is "
            f"{100 * challenger.mean():.2f} % on {len(challenger)} validation users",
            in_force=promotion.challenger,
            loser=gone,
        )
    champion = scores[CHAMPION]
    values = (challenger - champion).to_numpy()[:, None]
    (mean,), (low,), (high,) = bootstrap_means(
        values, recipe.resamples, seed, recipe.confidence, np.array([True])
    )
    wins = bool(low > -margin)
    promotion = replace(
        promotion,
        ndcg_champion=float(champion.mean()),
        difference=float(mean),
        difference_low=float(low),
        difference_high=float(high),
        margin=margin,
        confidence=recipe.confidence,
        reason=f"NDCG@{promotion.k} difference on {len(values)} validation users: "
        f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] points, which "
        f"{'excludes' if wins else 'does not exclude'} a loss of more than {100 * margin:g}",
    )
    if not wins:
        return promotion
    return replace(
        promotion,
        decision="promoted",
        in_force=promotion.challenger,
        loser=promotion.champion,
    )


# -- the record ---------------------------------------------------------------------------


def recorded(store: Store, dataset: str) -> pd.DataFrame:
    """``PROMOTIONS`` so far, oldest first.

    Raises:
        StoreError: the table is damaged. It is a record and cannot be made again.
    """
    directory = Path(str(store.table_path(CHAMPION_RECORD, dataset, "any"))).parent
    # The first record's pointer may be missing because a kill came before it; a later one's not.
    begun = len(list(directory.glob("[!.]*.parquet"))) > 1
    try:
        if store.current(CHAMPION_RECORD, dataset, kind="tables") is None and not begun:
            return typed(pd.DataFrame(columns=PROMOTIONS.names), PROMOTIONS)
        return store.read_table(CHAMPION_RECORD, dataset).frame
    except StoreError as error:
        raise StoreError(
            f"the record of promotions of {dataset} cannot be read, and nothing is decided that "
            f"would overwrite it ({error}). An older version of it may lie in {directory}: name "
            "one in its current.json; or remove that directory to begin a new record"
        ) from error


def with_row(past: pd.DataFrame, promotion: Promotion) -> pd.DataFrame:
    """``PROMOTIONS`` with one more row; none is ever changed."""
    row = typed(pd.DataFrame([asdict(promotion)]), PROMOTIONS)
    return row if past.empty else typed(pd.concat([past, row], ignore_index=True), PROMOTIONS)


def with_missing_row(store: Store, dataset: str, past: pd.DataFrame, run_id: str) -> pd.DataFrame:
    """``past``, made up where a kill came between putting a champion in force and recording it:
    its manifest knows the row, and a change of the pointer alone is a roll-back."""
    current = store.current(CHAMPION, dataset, kind="checkpoints")
    last = past["in_force"].iloc[-1] if len(past) else None
    before = None if pd.isna(last) else str(last)
    if current is None or current == before:
        return past
    manifest = read_manifest(store.checkpoint(CHAMPION, dataset))
    promotion = Promotion(**manifest["facts"]["promotion"])
    if promotion.decided_at not in set(past["decided_at"]):
        return with_row(past, replace(promotion, challenger=current, in_force=current))
    side = side_of(past, current)
    assert side is not None  # its own row is there
    reason = "found in force: the run that put it there was killed before it recorded it"
    return with_row(past, rolled_back(opened(side, side_of(past, before), run_id), reason))


def side_of(past: pd.DataFrame, version: str | None) -> Side | None:
    """A version that challenged once, or None."""
    rows = past[past["challenger"] == version]
    if version is None or rows.empty:
        return None
    row = rows.iloc[-1]
    test = row["test_ndcg_challenger"]
    return Side(
        version,
        row["challenger_recipe"],
        row["challenger_stage"],
        row["challenger_decoding"],
        None if pd.isna(test) else float(test),
    )


def roll_back(
    store: Store, dataset: str, version: str, past: pd.DataFrame, run_id: str
) -> Promotion:
    """Puts an earlier champion in force again.

    Raises:
        DataError: it never was champion, is not kept, or is damaged; names those that can be.
    """
    current = store.current(CHAMPION, dataset, kind="checkpoints")
    kept = [name for name in kept_champions(store, dataset, past) if name != current]
    side = side_of(past, version)
    if side is None or version not in kept:
        raise DataError(
            f"{version} cannot be champion of {dataset} again: it must have been, and lie there "
            f"intact; there are {', '.join(kept) or 'none'} beside the current {current}"
        )
    store.adopt(CHAMPION, dataset, version)
    return rolled_back(opened(side, side_of(past, current), run_id), "asked for by roll_back_to")


def kept_champions(store: Store, dataset: str, past: pd.DataFrame) -> list[str]:
    """Versions that were champion and lie there intact, the latest in force first."""
    kept = []
    for version in dict.fromkeys(past["in_force"].dropna().tolist()[::-1]):
        with contextlib.suppress(StoreError):
            store.checkpoint(CHAMPION, dataset, version)
            kept.append(version)
    return kept


def settled(past: pd.DataFrame, promotion: Promotion, margin: float) -> str | None:
    """What was decided already about this challenger, this champion and this margin, or None.

    So that a rerun decides nothing twice, and a champion that was rolled back does not come back
    by itself.
    """
    same = past[
        # A further attempt at the same policy (`-2`) is the same policy.
        (past["challenger"].str.split("-").str[0] == promotion.challenger)
        & (past["champion"] == promotion.champion)
        & (past["margin"] == margin)
        & past["decision"].isin(["promoted", "kept"])
    ]
    if same.empty:
        return None
    row = same.iloc[-1]
    return f"{row['decision']} at {row['decided_at']}: {row['reason']}"
