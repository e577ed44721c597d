"""The rows of a ``*_responses`` table: every test window by every decoding, on the same terms."""

from __future__ import annotations

import json
from pathlib import Path

import catalogue_cases as cases
import pandas as pd
import pytest

from llmrec_assets.ground.answers import answer_versions, ground_responses
from llmrec_assets.ground.errors import ModelError
from llmrec_assets.ground.recipes import BaseModelRecipe, GenerationRecipe, GroundingRecipe
from llmrec_assets.ground.recommender import Candidates
from llmrec_assets.models import generation
from llmrec_assets.models.answers import Answers, answer_test_prompts
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.device import Device
from llmrec_assets.models.prefill import prefill

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


def _answers(base_dir, device, tables, recipe=RECIPE, candidates=None) -> Answers:
    version = candidates.version if candidates else None
    return answer_test_prompts(
        **tables,
        base_dir=base_dir,
        adapters=[],
        recipe=recipe,
        stage="base",
        prompts_version="p",
        answer_versions=answer_versions(recipe, 1, "code", version),
        max_users=None,
        top_k=K,
        seed=1,
        device=device,
        candidates=candidates,
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
    assert "prompts_at_once" not in answers.facts
    for decoding in ("prefill", *RECIPE.decodings):
        assert answers.facts[f"{decoding}_seconds_per_prompt"] >= 0
    for decoding in RECIPE.decodings:
        assert answers.facts[f"{decoding}_tokens_per_prompt"] > 0
    slots = ground_responses(
        frame, tables["prompts"], tables["ratings"], tables["movies"], GroundingRecipe(), K
    )
    found = slots[slots["decoding"] != "free"]
    assert set(found["grounding"]) == {"exact"}
    assert not found["is_duplicate"].any() and not found["is_seen"].any()


@pytest.mark.parametrize("decoding", RECIPE.decodings)
def test_answers_are_those_of_a_recipe_that_asks_for_nothing_else(
    base_dir, device, tables, decoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever other decodings go on from the same computed prompts, before or after."""
    computed = []

    def count(model, prompts, pad):
        computed.append(len(prompts))
        return prefill(model, prompts, pad)

    monkeypatch.setattr(generation, "prefill", count)
    kept = {} if decoding == "ranked" else {"beams": 9}
    alone = RECIPE.model_copy(update={"decodings": (decoding,), **kept})
    one = _answers(base_dir, device, tables, alone).frame
    other = _answers(base_dir, device, tables).frame
    assert one.equals(other[other["decoding"] == decoding].reset_index(drop=True))
    assert computed == [2, 2]  # both prompts at once, for one decoding and for three


HYBRID = RECIPE.model_copy(update={"candidates": "ease", "decodings": ("free", "ranked")})
FILMS = {(7, 0): frozenset({1, 2, 3, 4, 5, 6}), (9, 0): frozenset({1, 2, 8})}


def test_the_hybrid_ranks_the_unseen_candidates_and_leaves_other_rows_alone(
    base_dir, device, tables
) -> None:
    candidates = Candidates(FILMS, {})
    frame = _answers(base_dir, device, tables, HYBRID, candidates).frame
    assert frame["decoding"].drop_duplicates().tolist() == ["free", "ranked", "ranked-ease"]
    others = frame[frame["decoding"] != "ranked-ease"].reset_index(drop=True)
    alone = HYBRID.model_copy(update={"candidates": "none"})
    assert others.equals(_answers(base_dir, device, tables, alone).frame)
    mine = frame[frame["decoding"] == "ranked-ease"]
    shown = dict(zip(mine["user_id"], map(json.loads, mine["response"]), strict=True))
    for user, films in ((7, {3, 4, 5, 6}), (9, {1, 2, 8})):
        assert len(set(shown[user])) == K
        assert set(shown[user]) <= {TITLES[film - 1] for film in films}
    # the whole catalogue as candidates, and a beam for every title, rank alike
    everything = Candidates(dict.fromkeys(FILMS, frozenset(range(1, len(TITLES) + 1))), {})
    wide = HYBRID.model_copy(update={"beams": len(TITLES)})
    answers = _answers(base_dir, device, tables, wide, everything).frame.groupby("decoding")
    texts = answers["response"].agg(list)
    assert texts["ranked-ease"] == texts["ranked"]


@pytest.mark.parametrize("films", [frozenset(), frozenset({1, 2, 3, 4}), None])
def test_a_window_with_too_few_candidates_is_an_error_before_anything_is_asked(
    base_dir, device, tables, films
) -> None:
    proposed = {**FILMS, (7, 0): films}
    if films is None:
        del proposed[7, 0]
    found = len((films or frozenset()) - {1, 2})
    with pytest.raises(ModelError, match=rf"user 7, window 0: {found} films .* more candidates"):
        _answers(base_dir, device, tables, HYBRID, Candidates(proposed, {}))


def test_the_hybrid_without_candidates_is_an_error(base_dir, device, tables) -> None:
    with pytest.raises(ValueError, match="need the version of their candidates"):
        _answers(base_dir, device, tables, HYBRID)
