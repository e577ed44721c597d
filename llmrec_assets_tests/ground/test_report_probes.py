"""The report on memorisation and on leave-last-out: numbers, words, and what is missing."""

from __future__ import annotations

import pandas as pd
import pytest

from llmrec_assets.ground.pages import Paragraph, Table
from llmrec_assets.ground.report_probes import (
    leave_last_out_section,
    leave_last_out_words,
    memorisation_section,
    memorisation_words,
)
from llmrec_assets.ground.schemas import LEAVE_LAST_OUT, MEMORISATION
from llmrec_assets.ground.tables import conform, to_frame


def memorisation(source: float, control: float = 0.1) -> pd.DataFrame:
    rows = [
        ("title of id", condition, who, "exact", 100, round(100 * share), share, share - 0.05,
         share + 0.05, "base")
        for condition, who, share in (
            ("source", "model", source),
            ("control", "model", control),
            ("source", "baseline", 0.05),
        )
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=MEMORISATION.names)
    return to_frame(conform(frame, MEMORISATION, "memorisation"))


def leave_last_out(ease: float, knn: float = 0.08) -> pd.DataFrame:
    rows = [
        (name, setting, k, 943, 1664, *(value * k, value * k - 0.01, value * k + 0.01) * 2)
        for name, setting, value in (("itemknn", "save_nbrs 20", knn), ("ease", "", ease))
        for k in (1, 2)
    ]
    frame = pd.DataFrame(rows, columns=LEAVE_LAST_OUT.names)
    return to_frame(conform(frame, LEAVE_LAST_OUT, "leave_last_out"))


def texts(cells: list) -> list[str]:
    return [cell.text for cell in cells]


def test_shares_stand_side_by_side() -> None:
    table, words = memorisation_section(memorisation(0.3))
    assert isinstance(table, Table) and isinstance(words, Paragraph)
    ((_, rows),) = table.sections
    assert texts(rows[0]) == ["title of id: exact", "30.00", "10.00", "5.00"]
    assert rows[0][1].note == "[25.00, 35.00]"


@pytest.mark.parametrize(
    ("source", "said"),
    [(0.3, "lie apart in: title of id (exact)"), (0.19, "by heart is not shown"),
     (0.01, "by heart is not shown")],
)  # fmt: skip
def test_memory_is_claimed_only_above_the_control(source: float, said: str) -> None:
    assert said in memorisation_words(memorisation(source))


def test_every_k_has_its_columns() -> None:
    table, _ = leave_last_out_section(leave_last_out(0.1))
    assert isinstance(table, Table)
    assert [group for group, _ in table.columns] == ["", "", *["k = 1"] * 2, *["k = 2"] * 2]
    ((_, rows),) = table.sections
    assert texts(rows[0]) == ["itemknn", "save_nbrs 20", "8.00", "8.00", "16.00", "16.00"]


def test_the_best_is_told_with_who_comes_near() -> None:
    assert "NDCG@2: ease; no other interval overlaps" in leave_last_out_words(leave_last_out(0.1))
    near = leave_last_out_words(leave_last_out(0.085))
    assert "NDCG@2: ease; the intervals of itemknn overlap" in near
    assert "943 users, 1,664 films" in near


@pytest.mark.parametrize("section", [memorisation_section, leave_last_out_section])
def test_what_is_not_there_is_said(section) -> None:
    (words,) = section(None)
    assert "ot materialized" in words.text
