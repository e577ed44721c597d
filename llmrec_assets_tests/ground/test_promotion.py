"""Who becomes champion: by hand, from scores per user, and what the record keeps."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llmrec_assets.ground.errors import DataError, StoreError
from llmrec_assets.ground.promotion import (
    Promotion,
    Side,
    judged,
    kept_champions,
    opened,
    recorded,
    refused,
    rolled_back,
    settled,
    side_of,
    with_missing_row,
    with_row,
    without_opponent,
)
from llmrec_assets.ground.recipes import EvaluationRecipe
from llmrec_assets.ground.schemas import PROMOTIONS
from llmrec_assets.ground.stages import CHALLENGER, CHAMPION, CHAMPION_RECORD
from llmrec_assets.ground.store import Store

NEW = Side("new", "cpu", "dpo", "ranked", 0.2)
OLD = Side("old", "paper", "sft", "free", None)
RECIPE = EvaluationRecipe(resamples=2_000)


def metrics(challenger: list[float], champion: list[float] | None = None) -> pd.DataFrame:
    """The columns of ``USER_METRICS`` that are read; users 1, 2, …, one window each."""
    sides = {CHALLENGER: challenger} | ({} if champion is None else {CHAMPION: champion})
    return pd.DataFrame(
        [
            (side, "ranked", "prompt", user, 0, score)
            for side, scores in sides.items()
            for user, score in enumerate(scores, start=1)
        ],
        columns=["stage", "decoding", "information_set", "user_id", "window_index", "ndcg"],
    )


def decide(
    challenger: list[float],
    champion: list[float] | None = None,
    margin: float = 0.0,
    before: Side | None = OLD,
) -> Promotion:
    promotion = opened(NEW, before, "run", k=5, prompts_version="p", ratings_version="r")
    return judged(promotion, metrics(challenger, champion), RECIPE, margin=margin, seed=0)


def test_without_a_champion_the_challenger_is_the_first() -> None:
    promotion = decide([0.5, 0.0], before=None)
    assert (promotion.decision, promotion.in_force, promotion.loser) == ("first", "new", None)
    assert (promotion.n_users, promotion.ndcg_challenger) == (2, 0.25)
    assert promotion.difference is None and promotion.test_ndcg_challenger == 0.2


def test_a_challenger_better_for_everybody_wins_and_the_champion_is_the_loser() -> None:
    promotion = decide([0.6] * 20, [0.2] * 20)
    assert (promotion.decision, promotion.in_force, promotion.loser) == ("promoted", "new", "old")
    numbers = (promotion.difference, promotion.difference_low, promotion.difference_high)
    assert numbers == pytest.approx((0.4, 0.4, 0.4))
    assert promotion.ndcg_champion == pytest.approx(0.2)
    assert "+40.00 [+40.00, +40.00] points, which excludes a loss of more than 0" in (
        promotion.reason
    )


def test_a_worse_challenger_is_the_loser() -> None:
    promotion = decide([0.2] * 20, [0.6] * 20, margin=0.3)
    assert (promotion.decision, promotion.in_force, promotion.loser) == ("kept", "old", "new")
    assert "does not exclude a loss of more than 30" in promotion.reason


def test_the_interval_decides_not_the_mean() -> None:
    rng = np.random.default_rng(0)
    champion = rng.random(30)
    noisy = np.clip(champion + rng.normal(0.02, 0.5, 30), 0, 1)
    even = decide(noisy.tolist(), champion.tolist())
    assert even.difference_low < 0 < even.difference_high
    assert even.decision == "kept"
    wide = decide(noisy.tolist(), champion.tolist(), margin=-even.difference_low + 1e-9)
    assert wide.decision == "promoted"
    assert decide(noisy.tolist(), champion.tolist(), margin=-even.difference_low).decision == "kept"


def test_scores_are_paired_by_user() -> None:
    """Users differ far more than the two sides: unpaired, nothing could be told."""
    champion = [user / 40 for user in range(40)]
    promotion = decide([score + 0.01 for score in champion], champion)
    assert promotion.difference_low == pytest.approx(0.01)
    assert promotion.decision == "promoted"


def test_equal_lists_exclude_only_what_so_few_users_can() -> None:
    promotion = decide([0.0] * 20, [0.0] * 20, margin=0.01)
    assert promotion.decision == "kept"
    assert promotion.difference_low == pytest.approx(-(1 - 0.025 ** (1 / 20)))


def test_two_sides_on_different_users_are_refused() -> None:
    frame = metrics([0.1, 0.2], [0.1, 0.2])
    frame.loc[0, "user_id"] = 9
    promotion = opened(NEW, OLD, "run")
    with pytest.raises(DataError, match="scored on different users"):
        judged(promotion, frame, RECIPE, margin=0.0, seed=0)


def test_a_damaged_champion_is_replaced_and_named() -> None:
    promotion = decide([0.5, 0.0])  # a champion is in force, but nobody could ask it
    assert (promotion.decision, promotion.loser) == ("promoted", "old")
    assert promotion.reason.startswith("champion old is damaged")


def test_a_refusal_names_the_first_problem_and_counts_the_others() -> None:
    promotion = refused(opened(NEW, OLD, "run"), ["no_leak: user 7", "b", "c"])
    assert promotion.reason == "no_leak: user 7 (and 2 more)"
    assert (promotion.decision, promotion.in_force, promotion.loser) == ("refused", "old", "new")


def test_nobody_to_compare_by_keeps_the_champion() -> None:
    promotion = without_opponent(opened(NEW, OLD, "run"))
    assert (promotion.decision, promotion.in_force, promotion.n_users) == ("kept", "old", 0)


# -- the record ---------------------------------------------------------------------------


def test_a_row_has_the_columns_of_the_table_and_older_rows_stay(tmp_path: Path) -> None:
    assert list(asdict(decide([0.5]))) == PROMOTIONS.names
    store = Store.at(tmp_path)
    past = recorded(store, "sample")
    assert past.empty and list(past) == PROMOTIONS.names
    for number, promotion in enumerate(
        (decide([0.5], before=None), decide([0.1] * 9, [0.5] * 9)), start=1
    ):
        grown = with_row(recorded(store, "sample"), promotion)
        store.publish_table(CHAMPION_RECORD, "sample", grown)
        assert len(recorded(store, "sample")) == number
    first, second = recorded(store, "sample").to_dict("records")
    assert (first["decision"], second["decision"]) == ("first", "kept")
    assert pd.isna(first["difference"]) and second["difference"] == pytest.approx(-0.4)


def test_a_damaged_record_is_named_and_not_overwritten(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    version = store.publish_table(
        CHAMPION_RECORD, "sample", with_row(recorded(store, "sample"), decide([1]))
    )
    path = Path(str(store.table_path(CHAMPION_RECORD, "sample", version)))
    path.write_bytes(b"not a table")
    with pytest.raises(StoreError, match=r"record of promotions of sample cannot be read.*current"):
        recorded(store, "sample")


def test_a_record_whose_pointer_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    for promotion in (decide([0.5], before=None), decide([0.1] * 9, [0.5] * 9)):
        store.publish_table(
            CHAMPION_RECORD, "sample", with_row(recorded(store, "sample"), promotion)
        )
    pointer = Path(str(store.table_path(CHAMPION_RECORD, "sample", "any"))).with_name(
        "current.json"
    )
    for damage in (lambda: pointer.write_text("{"), pointer.unlink):
        damage()
        with pytest.raises(StoreError, match="record of promotions of sample cannot be read"):
            recorded(store, "sample")


def test_what_was_decided_is_found_by_challenger_champion_and_margin() -> None:
    past = with_row(
        with_row(pd.DataFrame(columns=PROMOTIONS.names), decide([0.5], before=None)),
        decide([0.1] * 9, [0.5] * 9, margin=0.01),
    )
    asked = opened(NEW, OLD, "another run")
    assert "kept at " in str(settled(past, asked, 0.01))
    assert settled(past, asked, 0.02) is None
    again = past.assign(challenger=past["challenger"] + "-2")  # published once more, so recorded
    assert "kept at " in str(settled(again, asked, 0.01))
    other = Side("older", "paper", "sft", "free", None)
    assert settled(past, opened(NEW, other, "another run"), 0.01) is None
    assert settled(past, opened(other, OLD, "another run"), 0.01) is None


def publish(store: Store, version: str, promotion: Promotion) -> Path:
    work = store.work_directory(CHAMPION, "sample", version)
    (work / "champion.json").write_text(version)
    return store.publish_checkpoint(
        CHAMPION,
        "sample",
        version,
        work,
        determinants={},
        facts={"promotion": asdict(promotion)},
    )


def test_a_row_that_a_kill_kept_from_the_record_comes_from_the_manifest(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    assert with_missing_row(store, "sample", recorded(store, "sample"), "run").empty
    first = decide([0.5], before=None)
    publish(store, "new", first)
    past = with_missing_row(store, "sample", recorded(store, "sample"), "run")
    assert past["decided_at"].tolist() == [first.decided_at]
    assert with_missing_row(store, "sample", past, "run").equals(past)


def test_a_roll_back_that_a_kill_kept_from_the_record_is_seen(tmp_path: Path) -> None:
    store = Store.at(tmp_path)
    past = recorded(store, "sample")
    for version, before in (("a", None), ("b", Side("a", "cpu", "sft", "ranked", None))):
        side = Side(version, "cpu", "sft", "ranked", 0.1)
        promotion = judged(
            opened(side, before, "run", k=5),
            metrics([0.5] * 9, None if before is None else [0.1] * 9),
            RECIPE,
            margin=0.0,
            seed=0,
        )
        publish(store, version, promotion)
        past = with_row(past, promotion)
    assert kept_champions(store, "sample", past) == ["b", "a"]
    store.adopt(CHAMPION, "sample", "a")
    row = with_missing_row(store, "sample", past, "run").iloc[-1]
    assert (row["decision"], row["in_force"], row["loser"]) == ("rolled back", "a", "b")
    assert "killed" in row["reason"]
    assert side_of(past, "b") == Side("b", "cpu", "sft", "ranked", 0.1)
    assert side_of(past, None) is None and side_of(past, "c") is None
    promotion = rolled_back(opened(side_of(past, "a"), side_of(past, "b"), "run"), "asked for")
    assert (promotion.in_force, promotion.loser, promotion.champion) == ("a", "b", "b")
    (Path(str(store.root)) / "checkpoints/champion/sample/b/champion.json").write_text("changed")
    assert kept_champions(store, "sample", past) == ["a"]
