"""Planted leaks and broken input: the run stops there, and what was in force stays in force."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import dagster as dg
import pandas as pd
import pytest

from llmrec_assets.ground import answers, evaluation
from llmrec_assets.ground.completions import parse_response
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.evaluation import user_metrics as score
from llmrec_assets.ground.prompts import render_prompts
from llmrec_assets.ground.recipes import Recipe, WindowRecipe, WindowsPerUser, load_recipe
from llmrec_assets.ground.recommendations import STAGE_ORDER
from llmrec_assets.ground.schemas import RECOMMENDATIONS
from llmrec_assets.ground.splits import split_users, temporal_split_time
from llmrec_assets.ground.stages import RECOMMENDATION_TABLES
from llmrec_assets.ground.tables import conform
from llmrec_assets.ground.windows import interaction_windows as draw_windows
from llmrec_assets.orchestration import partitions

if TYPE_CHECKING:
    from conftest import FinishedRun, Home

DRAWN = ("user_splits", "interaction_windows", "prompts")
DRAW_WINDOWS = "llmrec_assets.ground.windows.interaction_windows"
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


def without_the_global_time(split: str) -> Callable[..., pd.DataFrame]:
    """The windows of ``split`` as the user split alone draws them; the others lie right."""

    def draw(
        ratings: pd.DataFrame,
        splits: pd.DataFrame,
        recipe: WindowRecipe,
        *rest: Any,
        **options: Any,
    ) -> pd.DataFrame:
        user_split = recipe.model_copy(update={"protocol": "user-split"})
        free = draw_windows(ratings, splits, user_split, *rest, **options)
        right = draw_windows(ratings, splits, recipe, *rest, **options)
        both = pd.concat([free[free["split"] == split], right[right["split"] != split]])
        return both.sort_values(["user_id", "window_index"], ignore_index=True)

    return draw


@pytest.fixture
def temporal(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe ``tiny`` by the protocol ``temporal``, three windows a test user."""
    tiny = load_recipe("tiny")
    windows = tiny.windows.model_copy(
        update={"protocol": "temporal", "windows_per_user": WindowsPerUser(test=3)}
    )
    recipe = tiny.model_copy(update={"windows": windows})
    monkeypatch.setattr(partitions, "load_recipe", lambda name: recipe)
    return recipe


@pytest.mark.parametrize(
    ("planted", "problem"),
    [
        (without_the_global_time("test"), "lies before the global time"),
        (
            without_the_global_time("train"),
            "training ground truth was rated after the global time",
        ),
    ],
)
def test_a_window_on_the_wrong_side_of_the_global_time_is_blocked(
    copied: tuple[Home, dg.DagsterInstance],
    monkeypatch: pytest.MonkeyPatch,
    temporal: Recipe,
    planted: Callable[..., pd.DataFrame],
    problem: str,
) -> None:
    home, instance = copied
    before = home.current()
    monkeypatch.setattr(DRAW_WINDOWS, planted)
    result = home.materialize(instance, *DRAWN)
    failed = [event for event in result.all_events if event.is_step_failure]
    assert [event.step_key for event in failed] == ["interaction_windows"]
    assert home.current() == before
    (check,) = [
        e
        for e in result.get_asset_check_evaluations()
        if e.asset_key == dg.AssetKey("interaction_windows")
    ]
    assert (check.check_name, check.passed) == ("no_leak", False)
    assert problem in check.metadata["first"].value


def test_temporal_with_several_windows_a_test_user_reaches_the_metric_table(
    copied: tuple[Home, dg.DagsterInstance], temporal: Recipe
) -> None:
    home, instance = copied
    scored = ("user_metrics", "comparisons", "metric_table")
    result = home.materialize(instance, *DRAWN, "baseline_recommendations", *scored)
    assert result.success
    store = home.store
    ratings = store.read_table("ratings", "sample").frame
    split_time = temporal_split_time(ratings, temporal.windows)
    windows = store.read_table("interaction_windows", "sample|tiny").frame
    (drawn,) = result.asset_materializations_for_node("interaction_windows")
    assert drawn.metadata["protocol"].value == "temporal"
    assert drawn.metadata["split_time"].value == split_time
    train = windows["split"] == "train"
    assert windows.loc[train, "cutoff_timestamp"].max() < split_time
    assert windows.loc[~train, "cutoff_timestamp"].min() >= split_time

    scores = store.read_table("user_metrics", "sample|tiny").frame
    table = store.read_table("metric_table", "sample|tiny").frame
    assert set(scores["protocol"]) == set(table["protocol"]) == {"temporal"}
    # the language model's stages answered other prompts: left out, not mixed in
    assert not set(table["stage"]) & set(STAGE_ORDER)
    history, popular = (
        frame[(frame["stage"] == "popularity") & (frame["information_set"] == "history")]
        for frame in (scores, table)
    )
    row = popular.iloc[0]
    # and the fits knew nothing of what came after the global time
    (fitted,) = result.asset_materializations_for_node("baseline_recommendations")
    until = {record["stage"]: record["until"] for record in fitted.metadata["fits"].value}
    assert until["popularity"] == until["ease"] == until["sasrec"] == split_time
    per_user = history.groupby("user_id")["ndcg"]
    assert per_user.size().max() == 3
    assert (row["n_users"], row["n_windows"]) == (per_user.ngroups, len(history))
    assert row["n_windows"] == (windows["split"] == "test").sum() > row["n_users"]
    assert row["ndcg"] == pytest.approx(per_user.mean().mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("called", "planted", "asset", "check", "problem"),
    [
        (
            "splits.split_users",
            in_two_splits,
            "user_splits",
            "no_user_in_two_splits",
            "user 1 stands in 2 splits: test, train",
        ),
        (
            "windows.interaction_windows",
            context_from_after_the_cutoff,
            "interaction_windows",
            "no_leak",
            "context holds films rated after the cut-off",
        ),
        (
            "windows.interaction_windows",
            ground_truth_from_the_history,
            "interaction_windows",
            "no_leak",
            "is a film of the history",
        ),
        (
            "windows.interaction_windows",
            a_test_users_window_among_the_training_windows,
            "interaction_windows",
            "no_leak",
            "split is 'train', the user's is 'test'",
        ),
        (
            "prompts.render_prompts",
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
    monkeypatch.setattr(f"llmrec_assets.ground.{called}", planted)
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
    assert all((e.severity, e.blocking) == (dg.AssetCheckSeverity.ERROR, True) for e in recorded)
    (stopped,) = (e for e in recorded if not e.passed)
    assert stopped.check_name == check
    assert stopped.metadata["problems"].value >= 1
    assert problem in stopped.metadata["first"].value


@pytest.mark.parametrize(
    ("planted", "asset", "check"),
    [
        ("training_events", "baseline_recommendations", "fitted_on_training_users_only"),
        ("training_events", "base_responses", "candidates_of_training_users_only"),
        ("Popularity", "baseline_recommendations", "keeps_the_contract"),
    ],
)
def test_a_classical_recommender_that_saw_or_lists_too_much_is_blocked(
    copied: tuple[Home, dg.DagsterInstance],
    monkeypatch: pytest.MonkeyPatch,
    planted: str,
    asset: str,
    check: str,
) -> None:
    """One event of a test user among the training events; a list of films already seen."""
    from llmrec_assets.models import classical_lists

    home, instance = copied
    honest = getattr(classical_lists, planted)
    splits = home.store.read_table("user_splits", "sample|tiny").frame
    test_user = int(splits.loc[splits["split"] == "test", "user_id"].iloc[0])

    def one_event_more(*args: Any, **options: Any) -> pd.DataFrame:
        events = honest(*args, **options)
        return pd.concat([events, events.head(1).assign(user_id=test_user)], ignore_index=True)

    class Forgetful(honest if planted == "Popularity" else object):  # type: ignore[misc]
        def recommend(self, windows: Any, top_k: int) -> list[list[int]]:
            return [list(dict.fromkeys(window.films))[:top_k] for window in windows]

    wrong = {"training_events": one_event_more, "Popularity": Forgetful}[planted]
    monkeypatch.setattr(classical_lists, planted, wrong)
    before = home.current()
    result = home.materialize(instance, asset, config={"force": True})  # answers are reused else
    assert not result.success
    (failed,) = [event for event in result.all_events if event.is_step_failure]
    message = failed.step_failure_data.error.message
    assert f"{asset} is not published, check {check} failed" in message
    assert home.current() == before


def test_classical_lists_of_an_older_recipe_are_not_scored(
    copied: tuple[Home, dg.DagsterInstance], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, instance = copied
    tiny = load_recipe("tiny")
    edited = tiny.baselines.model_copy(update={"causal_grid_points": 3})
    recipe = tiny.model_copy(update={"baselines": edited})
    monkeypatch.setattr(partitions, "load_recipe", lambda name: recipe)
    before = home.current()
    result = home.materialize(instance, "user_metrics")
    (failed,) = [event for event in result.all_events if event.is_step_failure]
    message = failed.step_failure_data.error.cause.message
    assert "baseline_recommendations is stale" in message
    assert "materialize baseline_recommendations again" in message
    assert home.current() == before
    assert home.materialize(instance, "baseline_recommendations").success
    assert home.materialize(instance, "user_metrics").success


def scored_on_seen_items(
    lists: pd.DataFrame, prompts: pd.DataFrame, movies: pd.DataFrame, protocol: str
) -> pd.DataFrame:
    """The films of the context pass for the ground truth, and marks of seen films are ignored."""
    return score(
        lists.assign(is_seen=False),
        prompts.assign(ground_truth_movie_ids=prompts["context_movie_ids"]),
        movies,
        protocol,
    )


def scored_on_another_k(
    lists: pd.DataFrame, prompts: pd.DataFrame, movies: pd.DataFrame, protocol: str
) -> pd.DataFrame:
    return score(lists[lists["rank"] < lists["rank"].max()], prompts, movies, protocol)


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
        patch.setattr(DRAW_WINDOWS, ground_truth_from_the_history)
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


def up_to_an_apostrophe(text: str, max_items: int | None = None) -> list[str]:
    """The paper's parser: an apostrophe is a quote, and what stands behind it another item."""
    items = [piece for item in parse_response(text) for piece in item.split("'")]
    return [item.strip() for item in items if item.strip()][:max_items]


def test_a_parser_that_breaks_at_apostrophes_is_blocked(
    copied: tuple[Home, dg.DagsterInstance], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, instance = copied
    before = home.current()
    monkeypatch.setattr(answers, "parse_response", up_to_an_apostrophe)
    result = home.materialize(instance, "sft_recommendations")
    failed = {
        (check.asset_key.to_user_string(), check.check_name)
        for check in result.get_asset_check_evaluations()
        if not check.passed
    }
    assert not result.success
    assert failed == {("sft_recommendations", "catalogue_survives_parsing")}
    error = next(e for e in result.all_events if e.is_step_failure).step_failure_data.error
    assert "sft_recommendations is not published, check catalogue_survives_parsing" in error.message
    assert "'" in error.message and "mend completions.parse_response" in error.message
    assert home.current() == before
