"""From raw answers to slots, by hand."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from llmrec_assets.ground import answers
from llmrec_assets.ground.answers import (
    answer_versions,
    constrained_problems,
    ground_responses,
    parsing_problems,
    validity,
)
from llmrec_assets.ground.recipes import GroundingRecipe, load_recipe
from llmrec_assets.ground.recommendations import recommendation_frame
from llmrec_assets.ground.schemas import RECOMMENDATIONS
from llmrec_assets.ground.tables import conform

MOVIES = pd.DataFrame(
    [
        (1, "Toy Story (1995)", 1995, 1),
        (2, "Schindler's List (1993)", 1993, 2),
        (3, "Net, The (1995)", 1995, 3),
        (4, "Fargo (1996)", 1996, 4),
        (9, "Toy Story (1995)", 1995, 1),  # the same film under a second id
    ],
    columns=["movie_id", "title", "year", "canonical_movie_id"],
)

#: User 7 saw Toy Story, under its second id, exactly at the cut-off, and The Net after it.
RATINGS = pd.DataFrame(
    [(7, 9, 5, 100), (7, 3, 4, 101), (8, 4, 2, 50)],
    columns=["user_id", "movie_id", "rating", "timestamp"],
)

WINDOWS = pd.DataFrame(
    [(7, 0, 100), (8, 0, 100), (8, 1, 10), (99, 0, 100)],
    columns=["user_id", "window_index", "cutoff_timestamp"],
)

COLUMNS = ["user_id", "window_index", "rank", "text", "movie_id", "grounding"]


def responses(*rows: tuple[int, int, str]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["user_id", "window_index", "response"])
    return frame.assign(
        stage="sft",
        decoding="free",
        prompts_version="p",
        checkpoint_version="c",
        answer_version="a",
    )


def ground(answers: pd.DataFrame, top_k: int = 5, method: str = "ladder") -> pd.DataFrame:
    recipe = GroundingRecipe.model_validate({"method": method})
    return ground_responses(answers, WINDOWS, RATINGS, MOVIES, recipe, top_k)


FULL = (
    '["Schindler\'s List (1993)", "Toy Story (1995)", "Toy Story", '
    '"Alien Cowboys of Space (2031)", "The Net (1995)"]'
)


def test_a_full_answer():
    slots = ground(responses((7, 0, FULL)))
    found = slots[[*COLUMNS, "is_duplicate", "is_seen"]].astype(object)
    assert found.where(found.notna(), None).values.tolist() == [
        # the apostrophe breaks nothing
        [7, 0, 1, "Schindler's List (1993)", 2, "exact", False, False],
        # seen under its other id
        [7, 0, 2, "Toy Story (1995)", 1, "exact", False, True],
        [7, 0, 3, "Toy Story", 1, "normalised", True, True],
        # an absent film maps to nothing
        [7, 0, 4, "Alien Cowboys of Space (2031)", None, "refused", False, False],
        # seen, but only after the cut-off
        [7, 0, 5, "The Net (1995)", 3, "normalised", False, False],
    ]
    assert set(slots["stage"]) == {"sft"}
    assert set(slots["decoding"]) == {"free"}
    assert set(slots["information_set"]) == {"prompt"}
    assert set(slots["prompts_version"]) == {"p"}


def test_a_list_cut_off_loses_its_half_title_and_keeps_its_slots():
    slots = ground(responses((7, 0, '["Fargo (1996)", "Schindler\'s Li')))
    assert slots["rank"].tolist() == [1, 2, 3, 4, 5]
    assert slots["grounding"].tolist() == ["exact"] + ["missing"] * 4
    assert slots["text"][0] == "Fargo (1996)"
    assert slots["text"][1:].isna().all()
    assert slots["movie_id"][1:].isna().all()
    # two empty slots are no duplicates of each other
    assert not slots["is_duplicate"].any()


def test_items_beyond_top_k_are_dropped():
    slots = ground(responses((7, 0, FULL)), top_k=2)
    assert slots["movie_id"].tolist() == [2, 1]


@pytest.mark.parametrize("text", ["", "[]", "I cannot recommend films.", "```json\n```"])
def test_an_answer_without_a_film_has_no_film(text):
    slots = ground(responses((7, 0, text)))
    assert len(slots) == 5
    assert slots["movie_id"].isna().all()


def test_each_window_has_its_own_seen_set():
    answer = '["Fargo (1996)"]'
    slots = ground(responses((8, 1, answer), (8, 0, answer), (7, 0, answer)), top_k=1)
    assert slots[["user_id", "window_index", "is_seen"]].values.tolist() == [
        [8, 1, False],  # before user 8 rated it
        [8, 0, True],
        [7, 0, False],
    ]


def test_windows_without_a_response_have_no_slots():
    slots = ground(responses((8, 0, FULL)))
    assert set(slots["user_id"]) == {8}
    assert len(ground(responses())) == 0


def test_the_papers_rule_refuses_nothing():
    slots = ground(responses((7, 0, FULL)), method="paper")
    assert slots["movie_id"].notna().all()
    assert set(slots["grounding"]) == {"similar"}


@pytest.mark.parametrize("answers", [responses((7, 0, FULL)), responses()])
def test_slots_conform_to_the_declared_schema(answers):
    table = conform(ground(answers), RECOMMENDATIONS, "sft_recommendations")
    assert table.num_rows == 5 * len(answers)


def test_validity_counts_shares_of_slots():
    slots = ground(responses((7, 0, FULL), (8, 0, '["Fargo (1996)", "Net')))
    # of ten slots: 6 with text, 5 grounded, 1 duplicate, 3 seen (Toy Story twice, Fargo)
    assert validity(slots) == pytest.approx(
        {"slots": 10, "parsable": 0.6, "in_catalogue": 0.5, "duplicate": 0.1, "seen": 0.3}
    )


def test_validity_of_nothing():
    assert validity(ground(responses())) == {"slots": 0}


def test_every_title_survives_being_written_and_read() -> None:
    assert parsing_problems(MOVIES, GroundingRecipe()) == []
    # the published rule is not asked: its own mistakes are results
    assert parsing_problems(MOVIES, GroundingRecipe(method="paper")) == []


def test_a_title_that_does_not_survive_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken at the apostrophe, the second title also pushes the others out of their slots."""
    monkeypatch.setattr(
        answers,
        "parse_response",
        lambda text: [piece for item in json.loads(text) for piece in item.split("'")],
    )
    problems = parsing_problems(MOVIES, GroundingRecipe())
    assert problems[0].startswith('movies: "Schindler\'s List (1993)" (film 2) is read out of [')
    assert "as 'Schindler', film None" in problems[0]
    assert parsing_problems(MOVIES[~MOVIES["title"].str.contains("'")], GroundingRecipe()) == []


def test_lists_decoded_over_the_catalogue_keep_the_contract_and_free_text_is_exempt() -> None:
    movies = pd.DataFrame({"movie_id": [1, 2, 3], "canonical_movie_id": [1, 2, 3]})
    windows = pd.DataFrame({"user_id": [7], "window_index": [0], "cutoff_timestamp": [10]})
    ratings = pd.DataFrame({"user_id": [7], "movie_id": [1], "rating": [4], "timestamp": [5]})

    def problems(decoding: str, films: list[int]) -> list[str]:
        rows = [
            (7, 0, "sft", decoding, "prompt", rank, "text", film, "exact", None, False, film == 1,
             "p", "c", "a")
            for rank, film in enumerate(films, start=1)
        ]  # fmt: skip
        return constrained_problems(recommendation_frame(rows), windows, ratings, movies, 2)

    assert problems("ranked", [2, 3]) == []
    assert "film 1 is already seen" in problems("ranked", [1, 3])[0]
    assert "film 3 is repeated" in problems("constrained", [3, 3])[0]
    assert problems("free", [1, 1]) == []


def test_answers_of_before_the_hybrid_keep_their_versions():
    """Hashes as they stood in tables when ``ranked-ease`` came: it makes no older row stale."""
    generation = load_recipe("cpu").generation
    versions = answer_versions(generation, 1, "3", "candidates")
    hybrid = versions.pop("ranked-ease")
    assert versions == {
        "free": "a580adab4ac2f1eb",
        "constrained": "a15a268595a83f14",
        "ranked": "4c8d9b56e39750af",
    }
    others = answer_versions(generation, 2, "3", "others")
    assert others["ranked-ease"] != hybrid
    assert answer_versions(generation, 2, "3", "candidates")["ranked-ease"] == hybrid
    with pytest.raises(ValueError, match="version of their candidates"):
        answer_versions(generation, 1, "3")
