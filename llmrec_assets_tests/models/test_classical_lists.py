"""All classical lists for the committed sample: shape, tuning, and leaks planted into a fit."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from llmrec_assets.ground.answers import baselines_version
from llmrec_assets.ground.fits import training_events
from llmrec_assets.ground.prompts import render_prompts
from llmrec_assets.ground.recipes import load_recipe
from llmrec_assets.ground.splits import split_users
from llmrec_assets.ground.windows import interaction_windows
from llmrec_assets.models import classical_lists as module
from llmrec_assets.models.classical_lists import (
    ClassicalLists,
    Tables,
    classical_lists,
    ease_candidates,
    tune,
)

RECIPE = load_recipe("tiny")


@pytest.fixture(scope="module")
def inputs() -> tuple[pd.DataFrame, ...]:
    """prompts, user_splits, ratings and movies of 60 invented users who rate 24 of 40 films."""
    films = range(1, 41)
    rows = [
        (user, film, 1 + (user * 7 + film * 5) % 5, (user * 1_000 + order))
        for user in range(1, 61)
        for order, film in enumerate(sorted(films, key=lambda f: (f * (user % 9 + 3)) % 41)[:24])
    ]
    ratings = pd.DataFrame(rows, columns=["user_id", "movie_id", "rating", "timestamp"])
    movies = pd.DataFrame(
        {
            "movie_id": films,
            "title": [f"Film {film} (1990)" for film in films],
            "genres": [["Drama"] for _ in films],
            "canonical_movie_id": films,
        }
    )
    people = range(1, 61)
    users = pd.DataFrame(
        {"user_id": people, "gender": "F", "occupation": "writer", "age": 30, "city": None}
    )
    splits = split_users(users["user_id"], RECIPE.splits, 1)
    windows = interaction_windows(ratings, splits, RECIPE.windows, 1)
    prompts = render_prompts(windows, users, movies, RECIPE.prompts, RECIPE.windows)
    return prompts, splits, ratings, movies


def run(inputs: tuple[pd.DataFrame, ...]) -> ClassicalLists:
    return classical_lists(*inputs, RECIPE, prompts_version="p", seed=1)


@pytest.fixture(scope="module")
def made(inputs: tuple[pd.DataFrame, ...]) -> ClassicalLists:
    return run(inputs)


def test_every_list_answers_every_test_window(
    made: ClassicalLists, inputs: tuple[pd.DataFrame, ...]
) -> None:
    n_test = int((inputs[0]["split"] == "test").sum())
    assert n_test > 3
    lists = made.frame.groupby(["stage", "decoding", "information_set"]).size()
    assert (lists == 5 * n_test).all()
    both = [(stage, "ranking", name) for stage in ("als", "ease", "itemknn") for name in SETS]
    both += [(stage, "ranking", name) for stage in ("itemknn-causal", "sasrec") for name in SETS]
    assert set(lists.index) == {
        *both,
        ("popularity", "ranking", "history"),
        ("popularity", "ranking-shown", "prompt"),
        ("popularity-causal", "ranking", "history"),
    }
    assert set(made.frame["answer_version"]) == {baselines_version(RECIPE.baselines)}
    assert made.problems == {"keeps_the_contract": [], "fitted_on_training_users_only": []}
    assert made.frame.loc[made.frame["decoding"] == "ranking-shown", "is_seen"].any()


SETS = ("prompt", "history")


def test_what_was_chosen_and_fitted_is_told(made: ClassicalLists) -> None:
    chosen = made.facts["chosen"]
    assert set(chosen) == {f"{s} ({n})" for s in ("itemknn", "ease", "als", "sasrec") for n in SETS}
    assert chosen["itemknn (prompt)"]["last"] == 10  # as many films as a prompt shows
    assert chosen["ease (history)"]["regularization"] in (100, 1000)
    causal = [fit for fit in made.facts["fits"] if fit["until"] is not None]
    assert {fit["stage"] for fit in causal} == {"popularity-causal", "itemknn-causal"}
    assert len({fit["until"] for fit in causal}) == RECIPE.baselines.causal_grid_points
    whole = next(fit for fit in made.facts["fits"] if fit["until"] is None)
    assert all(fit["events"] < whole["events"] for fit in causal)


def test_the_same_seed_gives_the_same_table(
    made: ClassicalLists, inputs: tuple[pd.DataFrame, ...]
) -> None:
    pd.testing.assert_frame_equal(run(inputs).frame, made.frame)


def test_what_follows_the_cutoff_changes_no_list(
    made: ClassicalLists, inputs: tuple[pd.DataFrame, ...]
) -> None:
    """Test users' later ratings are their ground truth: no recommender may read them."""
    prompts, splits, ratings, movies = inputs
    test = prompts[prompts["split"] == "test"].set_index("user_id")["cutoff_timestamp"]
    late = ratings["timestamp"] > ratings["user_id"].map(test)
    assert late.any()
    blind = run((prompts, splits, ratings[~late], movies))
    pd.testing.assert_frame_equal(blind.frame, made.frame)


def test_a_causal_list_depends_on_the_past_alone(
    made: ClassicalLists, inputs: tuple[pd.DataFrame, ...]
) -> None:
    prompts, splits, ratings, movies = inputs
    first = prompts.loc[prompts["split"] == "test", "cutoff_timestamp"].min()
    train = ratings["user_id"].isin(splits.loc[splits["split"] == "train", "user_id"])
    turned = ratings.assign(
        rating=ratings["rating"].where(~train | (ratings["timestamp"] <= first), 5)
    )
    other = run((prompts, splits, turned, movies))

    def of_first(lists: ClassicalLists, stage: str) -> list[int]:
        user = prompts.loc[prompts["cutoff_timestamp"] == first, "user_id"].item()
        rows = lists.frame[(lists.frame["user_id"] == user) & (lists.frame["stage"] == stage)]
        return rows["movie_id"].tolist()

    assert of_first(other, "popularity-causal") == of_first(made, "popularity-causal")
    assert of_first(other, "popularity") != of_first(made, "popularity")


@pytest.mark.parametrize(
    ("user_split", "problem"),
    [("test", "took part in the fit, their split is test"), ("train", "events took part")],
)
def test_a_planted_training_event_is_found(
    inputs: tuple[pd.DataFrame, ...],
    monkeypatch: pytest.MonkeyPatch,
    user_split: str,
    problem: str,
) -> None:
    splits = inputs[1]
    user = int(splits.loc[splits["split"] == user_split, "user_id"].iloc[0])

    def leaking(*args: Any, **options: Any) -> pd.DataFrame:
        events = training_events(*args, **options)
        return pd.concat([events, events.head(1).assign(user_id=user, film=3)], ignore_index=True)

    monkeypatch.setattr(module, "training_events", leaking)
    found = run(inputs).problems["fitted_on_training_users_only"]
    for stage in ("popularity", "itemknn", "ease", "als", "sasrec", "itemknn-causal, fitted up"):
        assert any(line.startswith(stage) and problem in line for line in found), stage


def test_an_event_after_the_grid_time_is_found(
    inputs: tuple[pd.DataFrame, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_of_time(ratings: Any, splits: Any, movies: Any, until: Any = None) -> pd.DataFrame:
        return training_events(ratings, splits, movies)

    monkeypatch.setattr(module, "training_events", all_of_time)
    found = run(inputs).problems["fitted_on_training_users_only"]
    assert {line.split(",")[0] for line in found} == {"popularity-causal", "itemknn-causal"}
    assert any("an event of" in line for line in found)


def test_a_seen_film_is_found(
    inputs: tuple[pd.DataFrame, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(module.Popularity):
        def recommend(self, windows: Any, top_k: int) -> list[list[int]]:
            return [[*window.films[: top_k - 1], 40][:top_k] for window in windows]

    monkeypatch.setattr(module, "Popularity", Forgetful)
    found = run(inputs).problems["keeps_the_contract"]
    assert any("popularity (ranking, history)" in line and "seen" in line for line in found)


def test_the_better_candidate_is_chosen_and_the_first_of_equals(
    inputs: tuple[pd.DataFrame, ...],
) -> None:
    prompts, splits, ratings, movies = inputs
    tables = Tables(prompts, splits, ratings, movies, RECIPE, 1)
    truth = {key: sorted(films) for key, films in tables.truth.items()}

    class Knows:
        def __init__(self, n: int) -> None:
            self.n = n

        def recommend(self, windows: Any, top_k: int) -> list[list[int]]:
            return [truth.get(window.key, [self.n])[: self.n] for window in windows]

    candidates = [({"n": n}, Knows(n), SETS) for n in (1, 5, 0)]
    candidates += [({"n": 5, "again": True}, Knows(5), SETS)]
    best = tune(tables, iter(candidates))
    assert {name: tuned.values for name, tuned in best.items()} == {name: {"n": 5} for name in SETS}
    assert best["prompt"].validation_ndcg == pytest.approx(1)
    assert best["prompt"].lists == [[5]] * len(tables.test["prompt"])


def test_only_validation_users_choose_and_the_check_reads_who_did(
    inputs: tuple[pd.DataFrame, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    init = Tables.__init__
    user = int(inputs[0].loc[inputs[0]["split"] == "test", "user_id"].min())

    def with_a_test_user(self: Tables, *args: Any) -> None:
        init(self, *args)
        stranger = self.test["prompt"][0]
        self.validation["prompt"].append(stranger)
        self.truth[stranger.key] = frozenset({1})

    monkeypatch.setattr(Tables, "__init__", with_a_test_user)
    problem = f"user {user} chose hyperparameters, their split is test"
    assert problem in ease_candidates(*inputs, RECIPE, seed=1).problems
    assert problem in run(inputs).problems["fitted_on_training_users_only"]


# -- candidates ---------------------------------------------------------------------------


def test_candidates_are_the_head_of_the_tuned_list_from_what_the_prompt_shows(
    made: ClassicalLists, inputs: tuple[pd.DataFrame, ...]
) -> None:
    prompts, _, ratings, movies = inputs
    proposal = ease_candidates(*inputs, RECIPE, seed=1)
    assert proposal.problems == []
    candidates = proposal.candidates
    told = dict(made.facts["chosen"]["ease (prompt)"])
    assert proposal.validation_ndcg == pytest.approx(told.pop("validation_ndcg"), abs=1e-6)
    assert candidates.fit["values"] == told
    test = prompts[prompts["split"] == "test"]
    assert set(candidates.films) == {(user, 0) for user in test["user_id"].tolist()}
    lists = made.frame[
        (made.frame["stage"] == "ease") & (made.frame["information_set"] == "prompt")
    ]
    for user, cutoff in zip(
        test["user_id"].tolist(), test["cutoff_timestamp"].tolist(), strict=True
    ):
        films = candidates.films[user, 0]
        assert set(lists.loc[lists["user_id"] == user, "movie_id"]) <= films
        seen = ratings[(ratings["user_id"] == user) & (ratings["timestamp"] <= cutoff)]
        assert not films & set(seen["movie_id"])
        free = len(movies) - seen["movie_id"].nunique()
        assert len(films) == min(RECIPE.generation.candidates_per_prompt, free)


def test_candidates_know_no_more_than_the_prompt_and_nothing_after_the_cutoff(
    inputs: tuple[pd.DataFrame, ...],
) -> None:
    prompts, splits, ratings, movies = inputs
    shown = {
        (user, film)
        for user, films in zip(prompts["user_id"], prompts["context_movie_ids"], strict=True)
        for film in films
    }
    test = splits.loc[splits["split"] == "test", "user_id"]
    pairs = zip(ratings["user_id"], ratings["movie_id"], strict=True)
    hidden = ratings["user_id"].isin(test) & ~pd.Series([pair in shown for pair in pairs])
    blind = ratings.assign(rating=ratings["rating"].where(~hidden, 5))
    one = ease_candidates(*inputs, RECIPE, seed=1).candidates
    other = ease_candidates(prompts, splits, blind, movies, RECIPE, seed=1).candidates
    assert hidden.any() and not blind["rating"].equals(ratings["rating"])
    assert other.version == one.version


def test_the_candidates_version_changes_with_the_fit(inputs: tuple[pd.DataFrame, ...]) -> None:
    prompts, splits, ratings, movies = inputs
    first = ease_candidates(*inputs, RECIPE, seed=1).candidates
    assert ease_candidates(*inputs, RECIPE, seed=1).candidates.version == first.version
    train = splits.loc[splits["split"] == "train", "user_id"]
    changed = ratings.assign(rating=ratings["rating"].mask(ratings["user_id"] == train.iloc[0], 1))
    ease = RECIPE.baselines.ease.model_copy(update={"regularization": (5.0,)})
    fewer = RECIPE.generation.model_copy(update={"candidates_per_prompt": 6})
    others = [
        ease_candidates(prompts, splits, changed, movies, RECIPE, seed=1),
        *(
            ease_candidates(*inputs, RECIPE.model_copy(update=update), seed=1)
            for update in (
                {"baselines": RECIPE.baselines.model_copy(update={"ease": ease})},
                {"generation": fewer},
            )
        ),
    ]
    versions = {other.candidates.version for other in others}
    assert len(versions) == 3 and first.version not in versions


def test_a_leak_into_the_candidates_fit_is_found(
    inputs: tuple[pd.DataFrame, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = inputs[1]
    user = int(splits.loc[splits["split"] == "test", "user_id"].iloc[0])

    def leaking(*args: Any, **options: Any) -> pd.DataFrame:
        events = training_events(*args, **options)
        return pd.concat([events, events.head(1).assign(user_id=user, film=3)], ignore_index=True)

    monkeypatch.setattr(module, "training_events", leaking)
    found = ease_candidates(*inputs, RECIPE, seed=1).problems
    assert f"ease: user {user} took part in the fit, their split is test" in found
