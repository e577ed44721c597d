"""Planted leaks and broken input: the run stops there, and what was in force stays in force."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import dagster as dg
import pandas as pd
import pytest

from llmrec_assets.ground import evaluation
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.evaluation import user_metrics as score
from llmrec_assets.ground.prompts import render_prompts
from llmrec_assets.ground.schemas import RECOMMENDATIONS
from llmrec_assets.ground.splits import split_users
from llmrec_assets.ground.stages import RECOMMENDATION_TABLES
from llmrec_assets.ground.tables import conform
from llmrec_assets.ground.windows import interaction_windows as draw_windows
from llmrec_assets.orchestration.assets import prompts as prompts_assets

if TYPE_CHECKING:
    from conftest import FinishedRun, Home

DRAWN = ("user_splits", "interaction_windows", "prompts")
Frames = tuple[Any, ...]


def in_two_splits(users: pd.Series, *rest: Any) -> pd.DataFrame:
    frame = split_users(users, *rest)
    first = frame.iloc[[0]]
    other = "test" if first["split"].item() == "train" else "train"
    return pd.concat([frame, first.assign(split=other)], ignore_index=True)


def _with(windows: pd.DataFrame, column: str, row: int, value: list[int]) -> pd.DataFrame:
    cells = windows[column].tolist()
    cells[row] = value
    return windows.assign(**{column: cells})


def context_from_after_the_cutoff(*args: Any, **options: Any) -> pd.DataFrame:
    windows = draw_windows(*args, **options)
    context = list(windows["context_movie_ids"].iloc[0])
    return _with(
        windows,
        "context_movie_ids",
        0,
        [*context[:-1], int(windows["ground_truth_movie_ids"].iloc[0][0])],
    )


def ground_truth_from_the_history(*args: Any, **options: Any) -> pd.DataFrame:
    windows = draw_windows(*args, **options)
    truth = list(windows["ground_truth_movie_ids"].iloc[0])
    return _with(
        windows,
        "ground_truth_movie_ids",
        0,
        [int(windows["context_movie_ids"].iloc[0][0]), *truth[1:]],
    )


def a_test_users_window_among_the_training_windows(*args: Any, **options: Any) -> pd.DataFrame:
    windows = draw_windows(*args, **options)
    row = windows.index[windows["split"] == "test"][0]
    windows.loc[row, "split"] = "train"
    return windows


def a_prompt_with_the_answer(
    windows: pd.DataFrame, users: pd.DataFrame, movies: pd.DataFrame, *rest: Any
) -> pd.DataFrame:
    frame = render_prompts(windows, users, movies, *rest)
    titles = movies.set_index("movie_id")["title"]
    answer = titles[frame["ground_truth_movie_ids"].iloc[0][0]]
    texts = frame["prompt"].tolist()
    texts[0] += f"\nHint: {answer}"
    return frame.assign(prompt=texts)


@pytest.mark.parametrize(
    ("called", "planted", "asset", "check", "problem"),
    [
        (
            "split_users",
            in_two_splits,
            "user_splits",
            "no_user_in_two_splits",
            "user 1 stands in 2 splits: test, train",
        ),
        (
            "draw_windows",
            context_from_after_the_cutoff,
            "interaction_windows",
            "no_leak",
            "context holds films rated after the cut-off",
        ),
        (
            "draw_windows",
            ground_truth_from_the_history,
            "interaction_windows",
            "no_leak",
            "is a film of the history",
        ),
        (
            "draw_windows",
            a_test_users_window_among_the_training_windows,
            "interaction_windows",
            "no_leak",
            "split is 'train', the user's is 'test'",
        ),
        (
            "render_prompts",
            a_prompt_with_the_answer,
            "prompts",
            "prompts_show_their_windows_only",
            "the prompt names ground truth",
        ),
    ],
)
def test_a_planted_leak_is_blocked(
    copied: tuple[Home, dg.DagsterInstance],
    monkeypatch: pytest.MonkeyPatch,
    called: str,
    planted: Callable[..., pd.DataFrame],
    asset: str,
    check: str,
    problem: str,
) -> None:
    home, instance = copied
    before = home.current()
    monkeypatch.setattr(prompts_assets, called, planted)
    result = home.materialize(instance, *DRAWN, "baseline_recommendations", "sft_checkpoint")

    assert not result.success
    failed = [event for event in result.all_events if event.is_step_failure]
    assert [event.step_key for event in failed] == [asset]
    error = failed[0].step_failure_data.error
    assert f"{asset} is not published, check {check} failed" in error.message

    ran = {event.step_key for event in result.all_events if event.is_step_start}
    assert ran == set(DRAWN[: DRAWN.index(asset) + 1])
    materialized = {e.asset_key.to_user_string() for e in result.get_asset_materialization_events()}
    assert asset not in materialized
    assert home.current() == before

    # what the UI reads: the event log, not this process's memory
    recorded = [
        record.dagster_event.event_specific_data
        for record in instance.all_logs(result.run_id)
        if record.dagster_event
        and record.dagster_event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
        and record.dagster_event.event_specific_data.asset_key == dg.AssetKey(asset)
    ]
    assert [(e.check_name, e.passed, e.severity, e.blocking) for e in recorded] == [
        (check, False, dg.AssetCheckSeverity.ERROR, True)
    ]
    assert recorded[0].metadata["problems"].value >= 1
    assert problem in recorded[0].metadata["first"].value


def scored_on_seen_items(
    lists: pd.DataFrame, prompts: pd.DataFrame, movies: pd.DataFrame
) -> pd.DataFrame:
    """The films of the context pass for the ground truth, and marks of seen films are ignored."""
    return score(
        lists.assign(is_seen=False),
        prompts.assign(ground_truth_movie_ids=prompts["context_movie_ids"]),
        movies,
    )


def scored_on_another_k(
    lists: pd.DataFrame, prompts: pd.DataFrame, movies: pd.DataFrame
) -> pd.DataFrame:
    return score(lists[lists["rank"] < lists["rank"].max()], prompts, movies)


@pytest.mark.parametrize(
    ("planted", "problem"),
    [(scored_on_seen_items, "n_ground_truth is 10"), (scored_on_another_k, "precision is")],
)
def test_a_planted_fault_of_the_evaluation_is_blocked(
    copied: tuple[Home, dg.DagsterInstance],
    monkeypatch: pytest.MonkeyPatch,
    planted: Callable[..., pd.DataFrame],
    problem: str,
) -> None:
    home, instance = copied
    before = home.current()
    monkeypatch.setattr(evaluation, "user_metrics", planted)
    result = home.materialize(instance, "user_metrics", "comparisons", "metric_table")
    assert [e.step_key for e in result.all_events if e.is_step_failure] == ["user_metrics"]
    (check,) = result.get_asset_check_evaluations()
    assert (check.check_name, check.passed, check.blocking) == ("scores_hold", False, True)
    assert problem in check.metadata["first"].value
    assert home.current() == before


def test_lists_of_another_length_are_blocked(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    """Lists of k - 1 slots score without complaint; only the recipe knows k."""
    home, instance = copied
    for asset in RECOMMENDATION_TABLES:
        frame = home.store.read_table(asset, "sample|tiny").frame
        shorter = frame[frame["rank"] < frame["rank"].max()]
        home.store.publish_table(asset, "sample|tiny", conform(shorter, RECOMMENDATIONS, asset))
    result = home.materialize(instance, "user_metrics")
    (check,) = result.get_asset_check_evaluations()
    assert (check.check_name, check.passed) == ("scores_hold", False)
    assert "has 4 slots, expected the ranks 1 to 5 once each" in check.metadata["first"].value


def test_the_checks_pass_again_once_the_leak_is_mended(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = copied
    before = home.current()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts_assets, "draw_windows", ground_truth_from_the_history)
        assert not home.materialize(instance, *DRAWN).success
    assert home.materialize(instance, *DRAWN).success
    assert home.current() == before


@pytest.fixture
def broken_sample(new_home: Callable[..., Home], finished: FinishedRun) -> Home:
    """A home where the sample has run, whose sample directory then broke at one row."""
    home = new_home(like=finished.home)
    directory = home.root / "broken"
    shutil.copytree(home.sample_dir, directory)
    lines = (directory / "u.data").read_text().split("\n")
    lines[776] = "1\t5\t3"
    (directory / "u.data").write_text("\n".join(lines))
    return type(home)(home.root, sample_dir=directory)


def test_a_broken_row_is_named_and_the_ratings_in_force_stay(
    broken_sample: Home, finished: FinishedRun
) -> None:
    home = broken_sample
    with home.instance() as instance, pytest.raises(DataError) as raised:
        home.run(instance)
    assert str(raised.value).startswith(
        "ratings: row 777 of u.data has 3 fields, expected 4 (user, item, rating, timestamp)"
    )
    assert home.current("sample") == finished.home.current("sample")
    with home.instance() as instance:
        runs = instance.get_runs()
        assert [(r.job_name, r.status) for r in runs] == [
            ("source_data", dg.DagsterRunStatus.FAILURE)
        ]
        failures = [
            record.dagster_event.event_specific_data.error
            for record in instance.all_logs(runs[0].run_id)
            if record.dagster_event and record.dagster_event.is_step_failure
        ]
    assert "DataError: ratings: row 777 of u.data" in failures[0].cause.message


def test_a_missing_file_is_named_and_nothing_is_published(new_home, tmp_path) -> None:
    directory = tmp_path / "sample"
    shutil.copytree(new_home().sample_dir, directory)
    (directory / "u.item").unlink()
    home = new_home(sample_dir=directory)
    with home.instance() as instance, pytest.raises(DataError, match=r"has no u\.item"):
        home.run(instance)
    assert not (home.location / "tables").exists()
    assert not list((home.location / "checkpoints").rglob("current.json"))
