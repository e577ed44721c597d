"""The rows of a ``*_responses`` table: every test window by every decoding, on the same terms."""

from __future__ import annotations

import json
from pathlib import Path

import catalogue_cases as cases
import pandas as pd
import pytest

from llmrec_assets.ground.answers import answer_versions, ground_responses
from llmrec_assets.ground.recipes import BaseModelRecipe, GenerationRecipe, GroundingRecipe
from llmrec_assets.models.answers import Answers, Candidates, answer_test_prompts
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.device import Device

TINY = BaseModelRecipe(source="tiny", name="tiny", dtype="float32", label="tiny", seed=4)
RECIPE = GenerationRecipe(
    decodings=("free", "constrained", "ranked"),
    beams=6,
    max_new_tokens=5,
    batch_size=2,
    do_sample=True,
    dtype="float32",
)
TITLES = [*cases.TITLES[1:5], "Heat (1995)", "Café d'été (1991)", 'He said "no" (1990)', "Fl"]
K = 3


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    return prepare_base_model(TINY, tmp_path_factory.mktemp("base") / "files")[0]


@pytest.fixture(scope="module")
def device() -> Device:
    return Device("cpu", "CPU", "cpu")


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    n = len(TITLES)
    movies = pd.DataFrame(
        {
            "movie_id": range(1, n + 1),
            "title": TITLES,
            "year": None,
            "canonical_movie_id": range(1, n + 1),
        }
    )
    # user 7 has seen films 1 and 2 by the cut-off, film 3 later; user 9 nothing
    ratings = pd.DataFrame(
        {"user_id": [7, 7, 7], "movie_id": [1, 2, 3], "timestamp": [10, 20, 30], "rating": 5}
    )
    prompts = pd.DataFrame(
        {
            "user_id": [9, 7, 8],
            "window_index": 0,
            "split": ["test", "test", "train"],
            "cutoff_timestamp": [25, 20, 25],
            "prompt": ["Any film?", "Recommend three films.", "Not asked."],
        }
    )
    return {"prompts": prompts, "ratings": ratings, "movies": movies}


def _answers(base_dir, device, tables, recipe=RECIPE, **options) -> Answers:
    return answer_test_prompts(
        **tables,
        base_dir=base_dir,
        adapters=[],
        recipe=recipe,
        stage="base",
        prompts_version="p",
        answer_versions=answer_versions(recipe, 1, "code"),
        max_users=None,
        top_k=K,
        seed=1,
        device=device,
        **options,
    )


def test_each_decoding_answers_each_test_window(base_dir, device, tables) -> None:
    answers = _answers(base_dir, device, tables)
    frame = answers.frame
    assert list(zip(frame["decoding"], frame["user_id"], strict=True)) == [
        (decoding, user) for decoding in RECIPE.decodings for user in (7, 9)
    ]
    assert frame["answer_version"].nunique() == 3
    lists = frame[frame["decoding"] != "free"]
    assert lists["finished"].all()
    for user, text in zip(lists["user_id"], lists["response"], strict=True):
        titles = json.loads(text)
        assert len(set(titles)) == K
        assert not set(titles) & (set(TITLES[:2]) if user == 7 else set())
    for decoding in RECIPE.decodings:
        assert answers.facts[f"{decoding}_seconds_per_prompt"] >= 0
        assert answers.facts[f"{decoding}_tokens_per_prompt"] > 0
    slots = ground_responses(
        frame, tables["prompts"], tables["ratings"], tables["movies"], GroundingRecipe(), K
    )
    found = slots[slots["decoding"] != "free"]
    assert set(found["grounding"]) == {"exact"}
    assert not found["is_duplicate"].any() and not found["is_seen"].any()


def test_free_answers_are_those_of_a_recipe_that_asks_for_nothing_else(
    base_dir, device, tables
) -> None:
    alone = RECIPE.model_copy(update={"decodings": ("free",), "beams": 9})
    one = _answers(base_dir, device, tables, alone).frame
    other = _answers(base_dir, device, tables).frame
    assert one.equals(other[other["decoding"] == "free"].reset_index(drop=True))


def test_ranking_within_candidates_is_named_for_the_hybrid_it_is(base_dir, device, tables) -> None:
    films = {(7, 0): frozenset({1, 2, 3, 4, 5}), (9, 0): frozenset({1, 2, 8})}
    recipe = RECIPE.model_copy(update={"decodings": ("ranked",)})
    frame = _answers(base_dir, device, tables, recipe, candidates=Candidates("ease", films)).frame
    assert set(frame["decoding"]) == {"ranked-ease"}
    shown = dict(zip(frame["user_id"], map(json.loads, frame["response"]), strict=True))
    assert set(shown[7]) == {TITLES[i - 1] for i in (3, 4, 5)}
    assert set(shown[9]) == {TITLES[i - 1] for i in (1, 2, 8)}
