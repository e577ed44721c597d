"""The metric table as people read it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from llmrec_assets.ground.report import markdown_table, readable, row_labels
from llmrec_assets.ground.schemas import METRIC_TABLE
from llmrec_assets.ground.tables import conform, to_frame

BASE = {
    "protocol": "user-split",
    "stage": "base",
    "decoding": "free",
    "information_set": "prompt",
    "k": 5,
    "n_users": 132,
    "n_windows": 132,
    "hits": 12,
    "ndcg": 0.01234,
    "ndcg_low": 0.0,
    "ndcg_high": 0.02346,
    "precision": 0.5,
    "precision_low": 0.25,
    "precision_high": 1.0,
    "recall": 0.1,
    "recall_low": 0.05,
    "recall_high": 0.15,
    "versus": None,
    "ndcg_difference": None,
    "ndcg_difference_low": None,
    "ndcg_difference_high": None,
    "ndcg_difference_p": None,
    "ndcg_difference_p_holm": None,
    "parsable": 0.996,
    "in_catalogue": 0.75,
    "duplicate": 0.0,
    "seen": 0.26,
    "prompts_version": "p",
    "recommendations_version": "r",
    "checkpoint_version": None,
    "answer_version": None,
}
SFT = {
    **BASE,
    "stage": "sft",
    "versus": "base",
    "ndcg_difference": 0.0123,
    "ndcg_difference_low": -0.004,
    "ndcg_difference_high": 0.03,
    "ndcg_difference_p": 0.004,
    "ndcg_difference_p_holm": 0.012,
}


def table(*rows: dict) -> pd.DataFrame:
    """Through the store's types, as the command line reads it."""
    return to_frame(conform(pd.DataFrame(rows), METRIC_TABLE, "metric_table"))


def test_a_row_in_per_cent_with_intervals():
    assert readable(table(SFT)).to_dict("records") == [
        {
            "stage": "sft",
            "decoding": "free",
            "sees": "prompt",
            "users": 132,
            "hits": "12/660",
            "NDCG@5 %": "1.23 [0.00, 2.35]",
            "Precision@5 %": "50.00 [25.00, 100.00]",
            "Recall@5 %": "10.00 [5.00, 15.00]",
            "NDCG difference": "+1.23 [-0.40, +3.00] vs base",
            "Holm p": "0.012",
            "parsable %": "100",
            "in catalogue %": "75",
            "duplicate %": "0",
            "seen %": "26",
        }
    ]


def test_without_a_stage_to_compare_with_there_is_no_difference():
    shown = readable(table(BASE, SFT))
    assert shown["stage"].tolist() == ["base", "sft"]
    assert shown["NDCG difference"].tolist() == ["", "+1.23 [-0.40, +3.00] vs base"]
    assert "nan" not in shown.to_string().lower()
    assert "none" not in shown.to_string().lower()


@pytest.mark.parametrize("null", [None, np.nan, pd.NA])
def test_null_is_null_however_it_is_written(null):
    frame = pd.DataFrame([{**BASE, "versus": null}])
    assert readable(frame)["NDCG difference"].tolist() == [""]


def test_a_worse_stage_has_a_minus():
    worse = {**SFT, "ndcg_difference": -0.02, "ndcg_difference_high": -0.001}
    assert readable(table(worse))["NDCG difference"].tolist() == ["-2.00 [-0.40, -0.10] vs base"]


def test_slots_are_counted_in_full_width():
    """k is a 16-bit column: 5 times 9,000 windows does not fit into one."""
    many = table({**BASE, "n_windows": 9_000, "n_users": 9_000})
    assert readable(many)["hits"].tolist() == ["12/45000"]


def test_the_list_length_stands_in_the_columns():
    assert "NDCG@10 %" in readable(table({**BASE, "k": 10})).columns


def test_a_hybrid_is_called_one_wherever_it_stands():
    hybrid = {**SFT, "decoding": "ranked-ease"}
    shown = readable(table(SFT, hybrid))["decoding"].tolist()
    assert shown == ["free", "ranked-ease (hybrid: EASE proposes, the LLM orders)"]
    row = ("sft", "ranked-ease", "prompt")
    assert row_labels(table(SFT, hybrid))[row] == "sft (ranked-ease, a hybrid, prompt)"
    assert row_labels(table(hybrid))[row] == "sft (ranked-ease, a hybrid, prompt)"


def test_an_empty_table_reads_as_nothing():
    empty = to_frame(
        conform(pd.DataFrame(columns=METRIC_TABLE.names), METRIC_TABLE, "metric_table")
    )
    assert readable(empty).empty


def test_a_markdown_table_escapes_what_a_model_wrote():
    frame = pd.DataFrame(
        {
            "text": ["<b>a|b</b>\nc & d ![x](https://y.example) `*_", None],
            "score": [0.123456, np.nan],
            "ids": [[1, 2], []],
            "n": pd.array([1, None], dtype="Int16"),
        }
    )
    assert markdown_table(frame).split("\n") == [
        "| text | score | ids | n |",
        "|---|---|---|---|",
        "| &#60;b>a&#124;b&#60;/b> ⏎ c &#38; d &#33;[x]&#40;https://y.example) &#96;&#42;&#95; "
        "| 0.1235 | [1, 2] | 1 |",
        "|  |  | [] |  |",
    ]


def test_a_long_cell_is_cut():
    (_, _, row) = markdown_table(pd.DataFrame({"text": ["x" * 301]})).split("\n")
    assert row == "| " + "x" * 300 + " … |"


def test_a_markdown_table_of_nothing():
    assert markdown_table(pd.DataFrame()) == "no rows"
    assert markdown_table(pd.DataFrame(columns=["a"])) == "| a |\n|---|"
