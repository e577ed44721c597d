"""Prompts say what the user rated, who they are, and nothing from after the cut-off."""

from __future__ import annotations

import time

import pandas as pd
import pytest

from llmrec_assets.ground.completions import parse_response
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.prompts import render_date, render_prompts
from llmrec_assets.ground.recipes import PromptRecipe, WindowRecipe
from llmrec_assets.ground.schemas import INTERACTION_WINDOWS, PROMPTS

MARCH_1998 = 889_660_800  # 12 March 1998, 00:00 UTC


@pytest.fixture
def movies() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "movie_id": range(1, 21),
            "title": [f"Invented, The {n} ({1970 + n}) " for n in range(1, 21)],
            "genres": [["Drama", "War"] if n % 2 else [] for n in range(1, 21)],
        }
    )


@pytest.fixture
def users() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "user_id": [1, 2, 3],
            "age": pd.array([24, None, None], dtype="Int16"),
            "age_band": [None, "25-34", "Under 18"],
            "gender": ["M", "F", "F"],
            "occupation": ["technician", "writer", "student"],
            "zip_code": ["85711", "T8H1N", "00000"],
            "city": ["Tucson", None, None],
            "state": ["AZ", None, None],
        }
    )


def window(user_id: int, ratings: list[int], truth: list[int] | None = None) -> dict[str, object]:
    return {
        "user_id": user_id,
        "window_index": 0,
        "split": "test",
        "cutoff_timestamp": MARCH_1998,
        "n_history": 30,
        "n_valid_cutoffs": 3,
        "context_movie_ids": list(range(1, len(ratings) + 1)),
        "context_ratings": ratings,
        "ground_truth_movie_ids": truth or [18, 12],
    }


def windows(*rows: dict[str, object]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=INTERACTION_WINDOWS.names)


def test_figure2_word_by_word(users: pd.DataFrame, movies: pd.DataFrame) -> None:
    table = render_prompts(
        windows(window(1, [5, 3, 2, 4])),
        users,
        movies,
        PromptRecipe(template="figure2", max_per_class=2),
        WindowRecipe(),
    )
    assert list(table.columns) == PROMPTS.names
    (row,) = table.to_dict("records")
    assert row["prompt"].splitlines() == [
        "You are a movie recommender system.",
        "The user: 24 years old, male, occupation: technician, from Tucson, AZ.",
        "Films the user liked, the most recent last:",
        "- Invented, The 2 (1972)",
        "- Invented, The 4 (1974)",
        "Films the user disliked, the most recent last:",
        "- Invented, The 3 (1973) [Drama, War]",
        "Recommend the 5 films the user would most like to watch next, the best first. Recommend "
        "only films released up to 12 March 1998 and none of the films listed above.",
        "Answer only with a JSON list of exactly 5 titles in double quotes, each with its year, "
        'such as ["Title (Year)", "Title (Year)"].',
    ]
    assert row["completion"] == '["Invented, The 18 (1988)", "Invented, The 12 (1982)"]'
    assert row["template"] == "figure2"
    assert row["context_movie_ids"] == [1, 2, 3, 4]


def test_compact_word_by_word(users: pd.DataFrame, movies: pd.DataFrame) -> None:
    table = render_prompts(
        windows(window(2, [5, 1, 3])),
        users,
        movies,
        PromptRecipe(template="compact", max_per_class=1),
        WindowRecipe(top_k=3),
    )
    assert table["prompt"][0].splitlines() == [
        "User: 25-34 years old, female, writer.",
        "Liked: Invented, The 1 (1971); Invented, The 3 (1973).",
        "Disliked: Invented, The 2 (1972).",
        "Recommend 3 other films released up to 12 March 1998, best first, as a JSON list of "
        "titles with years.",
    ]


@pytest.mark.parametrize("template", ["figure2", "compact"])
def test_an_empty_class_and_an_unknown_place_are_left_out(
    template: str, users: pd.DataFrame, movies: pd.DataFrame
) -> None:
    recipe = PromptRecipe.model_validate({"template": template})
    table = render_prompts(
        windows(window(3, [4, 3]), window(3, [1, 2])), users, movies, recipe, WindowRecipe()
    )
    only_liked, only_disliked = (prompt.casefold() for prompt in table["prompt"])
    assert "under 18, female" in only_liked
    assert "disliked" not in only_liked and " liked" in only_liked.replace("\n", " ")
    assert " liked" not in only_disliked.replace("\n", " ") and "disliked" in only_disliked
    assert " from " not in only_liked
    assert "nan" not in only_liked and "none," not in only_liked


def test_the_recipe_draws_the_line_between_liked_and_disliked(
    users: pd.DataFrame, movies: pd.DataFrame
) -> None:
    recipe = PromptRecipe(template="compact")
    at_four = render_prompts(
        windows(window(1, [3, 4])), users, movies, recipe, WindowRecipe(liked_min=4)
    )
    assert "Liked: Invented, The 2 (1972)." in at_four["prompt"][0]
    assert "Disliked: Invented, The 1 (1971)." in at_four["prompt"][0]


def test_completion_parses_to_the_ground_truth(users: pd.DataFrame, movies: pd.DataFrame) -> None:
    movies.loc[17, "title"] = 'Schindler\'s "List", The (1993)'
    table = render_prompts(windows(window(1, [3])), users, movies, PromptRecipe(), WindowRecipe())
    titles = movies.set_index("movie_id")["title"].str.strip()
    assert parse_response(table["completion"][0]) == [titles[18], titles[12]]


def test_nothing_in_nothing_out(users: pd.DataFrame, movies: pd.DataFrame) -> None:
    table = render_prompts(windows(), users, movies, PromptRecipe(), WindowRecipe())
    assert list(table.columns) == PROMPTS.names and table.empty


def test_an_unknown_film_is_named(users: pd.DataFrame, movies: pd.DataFrame) -> None:
    with pytest.raises(DataError, match=r"user 1 needs id 99, .*materialize"):
        render_prompts(windows(window(1, [3], [99])), users, movies, PromptRecipe(), WindowRecipe())


def test_dates_are_utc_days() -> None:
    assert render_date(MARCH_1998) == "12 March 1998"
    assert render_date(MARCH_1998 - 1) == "11 March 1998"
    assert render_date(0) == "1 January 1970"


def test_six_thousand_windows_take_seconds_and_compact_is_short(
    users: pd.DataFrame, movies: pd.DataFrame
) -> None:
    many = windows(*[window(1 + n % 3, [5, 4, 3, 2, 1] * 2) for n in range(6_000)])
    started = time.perf_counter()
    table = render_prompts(many, users, movies, PromptRecipe(template="compact"), WindowRecipe())
    assert time.perf_counter() - started < 5  # measured: 0.2 s
    assert len(table) == 6_000
    assert table["prompt"].str.len().max() < 500  # about four characters a token
