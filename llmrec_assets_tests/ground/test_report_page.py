"""The report: what it says, what it admits to lack, and that it shows foreign text as text."""

from __future__ import annotations

import math
import re

import pandas as pd
import pytest
from page_parser import HOSTILE, PNG, Page, assert_harmless

from llmrec_assets.ground.conclusions import verdict
from llmrec_assets.ground.published import PUBLISHED
from llmrec_assets.ground.recommendations import LIST_KEY
from llmrec_assets.ground.report_page import Curve, build_report
from llmrec_assets.ground.schemas import (
    BEYOND_ACCURACY,
    COMPARISONS,
    GROUP_METRICS,
    METRIC_TABLE,
    SAMPLE_RECOMMENDATIONS,
)
from llmrec_assets.ground.tables import conform, to_frame


def row(stage, ndcg=(0.01, 0.005, 0.02), difference=None, **other):
    shares = dict(zip(("ndcg", "ndcg_low", "ndcg_high"), ndcg, strict=True))
    names = ("ndcg_difference", "ndcg_difference_low", "ndcg_difference_high")
    return {
        "protocol": "user-split",
        "stage": stage,
        "decoding": "free",
        "information_set": "prompt",
        "k": 5,
        "n_users": 100,
        "n_windows": 100,
        "hits": 6,
        **shares,
        **{key.replace("ndcg", "precision"): value for key, value in shares.items()},
        **{key.replace("ndcg", "recall"): value for key, value in shares.items()},
        "versus": None if difference is None else "sft",
        **dict(zip(names, difference or (None,) * 3, strict=True)),
        "parsable": 0.9,
        "in_catalogue": 0.8,
        "duplicate": 0.1,
        "seen": 0.2,
        "prompts_version": "prompts-7",
        "recommendations_version": "r",
        **other,
    }


def popularity(estimate, **other):
    ends = (estimate, estimate - 0.01, estimate + 0.01)
    return row("popularity", ends, decoding="ranking", information_set="history", **other)


def metric_table(*rows):
    frame = pd.DataFrame(list(rows), columns=METRIC_TABLE.names)
    return to_frame(conform(frame, METRIC_TABLE, "metric_table"))


def pair(stage, versus, difference, p_holm, reason="predecessor", **other):
    """A comparison of two free lists; ``versus`` may be a whole row."""
    versus = versus if isinstance(versus, tuple) else (versus, "free", "prompt")
    return {
        "protocol": "user-split",
        "reason": reason,
        "stage": stage,
        "decoding": "free",
        "information_set": "prompt",
        **dict(zip((f"versus_{name}" for name in LIST_KEY), versus, strict=True)),
        "n_users": 100,
        "n_differ": 40,
        "difference": difference,
        "difference_low": difference - 0.01,
        "difference_high": difference + 0.01,
        "deviation": 0.1,
        "p": p_holm / 4,
        "p_holm": p_holm,
        "n_comparisons": 4,
        "is_shown": p_holm <= 0.05,
        "users_needed": 785,
        "user_metrics_version": "m",
        **other,
    }


def comparisons(*rows):
    frame = pd.DataFrame(list(rows), columns=COMPARISONS.names)
    return to_frame(conform(frame, COMPARISONS, "comparisons"))


def beyond(*rows):
    frame = pd.DataFrame(list(rows), columns=BEYOND_ACCURACY.names)
    return to_frame(conform(frame, BEYOND_ACCURACY, "beyond_accuracy"))


def groups(*rows):
    frame = pd.DataFrame(list(rows), columns=GROUP_METRICS.names)
    return to_frame(conform(frame, GROUP_METRICS, "group_metrics"))


POPULAR = ("popularity", "ranking", "history")


def sample(*rows):
    frame = pd.DataFrame(
        [(7, 0, *r) for r in rows], columns=["user_id", "window_index", *SAMPLE_COLUMNS]
    )
    return to_frame(conform(frame, SAMPLE_RECOMMENDATIONS, "sample_recommendations"))


SAMPLE_COLUMNS = ["row", "rank", "text", "title", "is_hit"]


def report(metrics=None, lists=None, dataset="ml-100k", **other):
    given = {
        "recipe_name": "tiny",
        "comparisons": comparisons(),
        "beyond_accuracy": beyond(),
        "group_metrics": groups(),
        "confidence": 0.95,
        "base_model": "a model",
        "memorisation": None,
        "leave_last_out": None,
        "facts": {},
        "curves": [],
        "generated": {},
        **other,
    }
    return build_report(
        dataset=dataset,
        metric_table=metric_table() if metrics is None else metrics,
        sample_recommendations=sample() if lists is None else lists,
        **given,
    )


# ---- verdict -------------------------------------------------------------------------------------


def test_the_verdict_names_every_missing_stage():
    told = verdict(metric_table(row("sft"), popularity(0.05)), comparisons())
    assert "base is missing. dpo is missing. rlhf is missing." in told
    assert "sft is missing." not in told
    assert "No stage stands beside the one it was trained from." in told


# ---- published figures ---------------------------------------------------------------------------


def test_the_published_precisions_are_whole_hits_and_map_repeats_them():
    """12 hits in 660 slots, as the issue says; a slip in a digit would not give whole numbers."""
    hits = {"ml-100k": {"base": 4, "sft": 12, "rlhf": 12}, "ml-1m": {"base": 11, "sft": 95}}
    for dataset, expected in hits.items():
        table = PUBLISHED[dataset]
        for stage, n in expected.items():
            figures = table.rows[stage]
            assert figures.precision * table.slots() == pytest.approx(n, abs=1e-9)
            assert math.isnan(figures.map) or figures.map == pytest.approx(figures.precision)
    assert PUBLISHED["ml-100k"].slots() == 660


def test_published_figures_stand_beside_ours_and_gaps_are_said():
    page = Page(report(metric_table(row("base"), row("sft"), popularity(0.05))).html)
    table = page.table("Means")
    names = ["stage", "users", "hits / slots", "NDCG@5 %", "Precision@5 %", "Recall@5 %"]
    assert table[0] == [*names, "NDCG@5 difference, points", "MAP %, published"]
    assert table[1] == ["ours", "published"] * 3
    ours = "1.00[0.50, 2.00]"
    assert page.row("Means", "sft") == [
        *("sft", "100", "6/500"),
        *(ours, "1.69", ours, "1.82", ours, "1.44"),
        *("", "1.82"),
    ]
    missing = ["not found"] * 4
    assert page.row("Means", "dpo") == [
        *("dpo", "missing", ""),
        *("", missing[0], "", missing[1], "", missing[2]),
        *("", missing[3]),
    ]
    assert page.row("Means", "rlhf")[1:5] == ["missing", "", "", "1.67"]
    assert page.row("Means", "popularity")[3:5] == ["5.00[4.00, 6.00]", ""]
    assert "12 hits in 660 slots (sft)" in page.text
    assert "k shrinks" in page.text


def test_published_figures_stand_beside_free_text_only():
    ranked = row("sft", decoding="ranked")
    page = Page(report(metric_table(row("base"), row("sft"), ranked)).html)
    assert page.row("Means", "sft (free, prompt)")[4] == "1.69"
    assert page.row("Means", "sft (ranked, prompt)")[4] == ""


def test_ml_1m_has_table_3_which_stops_at_sft():
    page = Page(report(metric_table(row("base")), dataset="ml-1m").html)
    assert "Table 3: the stages" in page.text
    assert page.row("Means", "sft")[-1] == "NaN"
    assert page.row("Means", "sft")[4] == "2.34"
    assert page.row("Means", "rlhf")[4] == "not published"
    assert "The paper stops at SFT" in page.text


def test_the_sample_has_nothing_to_be_compared_with():
    page = Page(report(metric_table(row("base")), dataset="sample").html)
    assert "published" not in str(page.table("Means"))
    assert "No published figures are comparable: the paper has none for sample." in page.text


# ---- what a run may lack -------------------------------------------------------------------------


def test_a_report_of_nothing_says_so_everywhere():
    made = report()
    for text in (Page(made.html).text, made.markdown):
        assert "the metric table is empty" in text
        assert "Missing: no stage has recommendations to show." in text
        assert "Missing: no curve was given." in text
        assert re.search(r"preference(_|&#95;)pairs: missing\.", text)
    page = Page(made.html)
    assert [r[1] for r in page.table("Means") if r[0] in ("base", "sft", "dpo", "rlhf")] == [
        "missing"
    ] * 4
    assert page.row("Versions", "rlhf_checkpoint")[1] == "missing"
    assert [r[0] for r in page.table("Versions")][1:] == [
        *("sft_checkpoint", "preference_pairs", "dpo_checkpoint", "reward_model"),
        "rlhf_checkpoint",
    ]
    assert made.files == {}


def test_facts_have_versions_seconds_and_runs_and_long_lists_are_counted():
    facts = {
        "sft_checkpoint": {
            "version": "v1",
            "seconds": 1740.25,
            "run_id": "run-9",
            "trained_user_ids": list(range(1000)),
            "libraries": {"trl": "1.16.0"},
        },
        "preference_pairs": {"pairs": 1234, "tie rate": 0.87125},
        "another_table": {"version": "v2"},
    }
    page = Page(report(metric_table(row("sft")), facts=facts).html)
    assert page.row("Versions", "sft_checkpoint") == ["sft_checkpoint", "v1", "1,740", "run-9"]
    assert page.row("Versions", "another_table")[1] == "v2"
    assert page.row("preference_pairs", "pairs") == ["pairs", "1,234"]
    assert page.row("preference_pairs", "tie rate") == ["tie rate", "0.8712"]
    rest = page.table("Everything else")
    assert ["sft_checkpoint", "trained_user_ids", "1000 values, not shown here"] in rest
    assert ["sft_checkpoint", "libraries", '{"trl": "1.16.0"}'] in rest
    assert "prompts-7" in page.text


# ---- Table 2 -------------------------------------------------------------------------------------


def test_one_user_shows_hits_groundings_refusals_and_empty_slots():
    lists = sample(
        ("liked", 1, "Calm (1990)", "Calm (1990)", False),
        ("liked", 2, "Dawn (1991)", "Dawn (1991)", False),
        ("ground truth", 1, "Ember (1992)", "Ember (1992)", False),
        ("sft", 1, "Ember (1992)", "Ember (1992)", True),
        ("sft", 2, "Embre", "Ember (1992)", False),
        ("sft", 3, "No Such Film", None, False),
        ("sft", 4, None, None, False),
        ("popularity (ranking, prompt)", 1, None, "Calm (1990)", False),
    )
    page = Page(report(lists=lists).html)
    assert page.table("What the prompt showed") == [
        ["rank", "liked", "disliked", "ground truth"],
        ["1", "Calm (1990)", "", "Ember (1992)"],
        ["2", "Dawn (1991)", "", ""],
    ]
    assert [r[0] for r in page.table("What each stage")] == [
        *("stage", "base", "sft", "dpo", "rlhf", "popularity (ranking, prompt)")
    ]
    assert page.row("What each stage", "sft") == [
        "sft",
        "✓ Ember (1992)",
        "Embre→ Ember (1992)",
        "No Such Film(not in the catalogue)",
        "—(empty slot)",
    ]
    assert page.row("What each stage", "dpo") == ["dpo", "missing", "", "", ""]


# ---- foreign text --------------------------------------------------------------------------------


def hostile_report():
    return report(
        metric_table(row("sft"), popularity(0.05)),
        sample(("liked", 1, HOSTILE, HOSTILE, False), ("sft", 1, HOSTILE, None, False)),
        recipe_name=HOSTILE,
        base_model=HOSTILE,
        facts={HOSTILE: {"version": HOSTILE, HOSTILE: HOSTILE, "list": [HOSTILE]}},
        curves=[Curve(HOSTILE, PNG), Curve(HOSTILE, PNG), Curve("../../../etc", PNG)],
        generated={HOSTILE: HOSTILE},
    )


def test_foreign_text_stays_text_wherever_the_report_shows_it():
    made = hostile_report()
    assert_harmless(made.html, made.markdown)
    assert all(re.fullmatch(r"(curves|figures)/[a-z0-9-]+\.png", path) for path in made.files)
    assert len(made.files) == 3 + 1  # the forest plot


def test_pictures_are_inline_in_html_and_files_in_markdown():
    made = report(curves=[Curve("Loss", PNG), Curve("Loss", PNG + b"2"), Curve("…/../x", PNG)])
    assert made.files == {
        "curves/loss.png": PNG,
        "curves/loss-2.png": PNG + b"2",
        "curves/x.png": PNG,
    }
    assert "![Loss](curves/loss.png)" in made.markdown
    assert sum(tag == "img" for tag, _ in Page(made.html).elements) == 3


def test_prose_is_not_cut_and_says_what_the_page_says():
    made = report(metric_table(row("base"), row("sft"), popularity(0.05)))
    told = verdict(metric_table(row("base"), row("sft"), popularity(0.05)), comparisons())
    assert told in Page(made.html).text
    assert told in made.markdown


def test_two_protocols_have_two_verdicts_two_forests_and_their_own_comparisons():
    temporal = {"protocol": "temporal"}
    table = metric_table(
        row("sft", (0.06, 0.05, 0.07)),
        popularity(0.045),
        row("sft", **temporal),
        popularity(0.045, **temporal),
    )
    compared = comparisons(
        pair("sft", POPULAR, 0.015, 0.01, "popularity"),
        pair("sft", POPULAR, -0.035, 0.01, "popularity", **temporal),
    )
    made = report(table, comparisons=compared)
    text = Page(made.html).text
    other = text.index("Verdict (user-split)")
    assert text.index("Verdict (temporal)") < text.index("Shown to be worse than it: sft.") < other
    assert text.index("Shown to beat popularity, 4.50 %") > other
    assert set(made.files) == {"figures/forest-user-split.png", "figures/forest-temporal.png"}


# ---- comparisons, lists, groups ------------------------------------------------------------------


def test_a_comparison_shows_its_interval_both_p_values_and_the_users_it_takes():
    table = metric_table(row("base"), row("sft"), popularity(0.05))
    compared = comparisons(
        pair("sft", "base", 0.0123, 0.002),
        pair("sft", POPULAR, -0.04, 0.2, "popularity", users_needed=None),
    )
    page = Page(report(table, comparisons=compared).html)
    first, second = (r for r in page.table("Paired differences") if r[0] == "sft")
    assert first == [
        *("sft", "base", "+1.23[+0.23, +2.23]", "< 0.001", "0.002", "yes", "100", "40", "785"),
    ]
    kinds = {given.get("class") for tag, given in page.elements if tag == "td"}
    assert "number hit" in kinds and "number worse" not in kinds  # only what is shown stands out
    assert second[4:] == ["0.200", "no", "100", "40", ""]
    headings = [r[0] for r in page.table("Paired differences") if len(r) == 1]
    assert headings == [
        "Each stage and the one it was trained from",
        "Each row and popularity",
    ]
    assert "1 of 2 differences are shown at the level 0.05" in page.text


def test_lists_are_described_and_what_is_not_known_stays_empty():
    lists = dict.fromkeys(BEYOND_ACCURACY.names) | {
        "protocol": "user-split", "stage": "sft", "decoding": "free", "information_set": "prompt",
        "k": 5, "n_windows": 100, "valid": 0.5, "n_films": 40, "coverage": 0.025,
        "novelty": 3.456, "response_tokens": 40.2, "recommendations_version": "r",
    }  # fmt: skip
    page = Page(report(metric_table(row("sft")), beyond_accuracy=beyond(lists)).html)
    assert page.row("What the lists are like", "sft") == [
        *("sft", "50", "40", "2.5", "3.46", "", "", "", "", "40"),
    ]
    assert "sft recommends the least known films" in page.text
    assert "None of these is better for being larger" in page.text


def group(name, ndcg, position, **other):
    low, high = ndcg - 0.01, ndcg + 0.01
    return {
        "protocol": "user-split", "stage": "sft", "decoding": "free", "information_set": "prompt",
        "grouping": "gender", "group": name, "position": position, "n_users": 50, "hits": 3,
        "ndcg": ndcg, "ndcg_low": low, "ndcg_high": high, "users_left_out": 7,
        "user_metrics_version": "m", **other,
    }  # fmt: skip


@pytest.mark.parametrize(("men", "says"), [(0.05, "do not overlap"), (0.03, "overlap: no diff")])
def test_groups_stand_side_by_side_and_who_is_left_out_is_counted(men, says):
    table = groups(group("men", men, 1), group("women", 0.02, 0))
    page = Page(report(metric_table(row("sft")), group_metrics=table).html)
    assert page.table("By gender")[0] == ["row", "women (50 users)", "men (50 users)"]
    assert page.row("By gender", "sft")[1] == "2.00[1.00, 3.00]"
    assert f"“women” and “men”, its furthest groups, {says}" in page.text
    assert "7 users are in no group shown" in page.text
    assert "By age: no group has enough users." in Page(
        report(metric_table(row("sft")), group_metrics=groups(group("men", 0.1, 1))).html
    ).text.replace("By age: terciles", "")
