"""Invented titles: one to one, clear of the real ones; and a check that finds a planted one."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_assets.ground.catalogue import (
    RealNames,
    catalogue_problems,
    invented_titles,
    real_title_problems,
    shown_catalogue,
)
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.grounding import Catalogue, Grounder
from llmrec_assets.ground.movielens import read_movies
from llmrec_assets.ground.recipes import GroundingRecipe, PromptRecipe
from llmrec_assets.ground.titles import normalise_title, split_year

REAL, INVENTED = PromptRecipe(), PromptRecipe(titles="invented")
TITLES = ["Net, The (1995)", "Home Alone (1990)", "unknown", "Seven (Se7en) (1995)",
          "Net, The (1995)", "Paris, Texas (1984)"]  # fmt: skip


def films(titles: list[str] | None = None) -> pd.DataFrame:
    titles = TITLES if titles is None else titles
    first = {title: i for i, title in reversed(list(enumerate(titles, start=1)))}
    return pd.DataFrame(
        {
            "movie_id": range(1, len(titles) + 1),
            "title": pd.Series(titles, dtype="string"),
            "year": pd.array([split_year(title)[1] for title in titles], dtype="Int16"),
            "release_date": None,
            "genres": [["Drama"] for _ in titles],
            "canonical_movie_id": [first[title] for title in titles],
        }
    )


# -- inventing ----------------------------------------------------------------------------


def test_real_titles_leave_the_films_as_they_are() -> None:
    pd.testing.assert_frame_equal(shown_catalogue(films(), REAL, 1), films())
    assert catalogue_problems(films(), films(), REAL) == []


def test_only_titles_change_and_ids_years_and_genres_stay() -> None:
    shown = shown_catalogue(films(), INVENTED, 1)
    assert catalogue_problems(shown, films(), INVENTED) == []
    rest = [name for name in films() if name != "title"]
    pd.testing.assert_frame_equal(shown[rest], films()[rest])
    assert [split_year(title)[1] for title in shown["title"]] == [
        1995,
        1990,
        None,
        1995,
        1995,
        1984,
    ]
    assert all(2 <= len(split_year(title)[0].split()) <= 4 for title in shown["title"])
    # one film under two ids keeps one title
    assert shown["title"][0] == shown["title"][4]
    assert shown["title"].nunique() == 5


def test_a_title_follows_from_seed_and_id_not_from_the_real_title() -> None:
    others = [f"Film {letter} (19{50 + i})" for i, letter in enumerate("abcdef")]
    names = [split_year(t)[0] for t in invented_titles(films(TITLES[:4]), 1)]
    again = [split_year(t)[0] for t in invented_titles(films(others), 1)]
    assert again[:4] == names  # other titles, two films more
    assert invented_titles(films(), 1) == invented_titles(films(), 1)
    assert not set(invented_titles(films(), 1)) & set(invented_titles(films(), 2))


@pytest.mark.parametrize("dataset", ["ml-100k", "ml-1m"])
def test_every_title_of_movielens_is_hidden_and_grounds_to_its_film(
    real_data, dataset: str
) -> None:
    movies = read_movies(real_data(dataset), dataset)
    shown = shown_catalogue(movies, INVENTED, 1)
    assert catalogue_problems(shown, movies, INVENTED) == []
    names = {normalise_title(title) for title in movies["title"]}
    assert not names & {normalise_title(title) for title in shown["title"]}
    grounder = Grounder(Catalogue(shown), GroundingRecipe())
    some = shown.iloc[:: max(1, len(shown) // 200)]
    written = [*some["title"], *(split_year(title)[0] for title in some["title"])]
    found = [match.movie_id for match in grounder.ground(written)]
    assert found == 2 * some["canonical_movie_id"].tolist()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_an_invention_steps_aside_for_a_real_title_of_its_own_words(seed: int, n: int) -> None:
    """The catalogue then holds, as a real film, exactly what would have been invented."""
    plain = films([f"zz{i} (1990)" for i in range(n)])
    would_be = split_year(invented_titles(plain, seed)[0])[0]
    last_word = would_be.split()[-1]
    real = films([f"{last_word}, The (1999)", *plain["title"][1:]])
    shown = shown_catalogue(real, INVENTED, seed)
    assert split_year(shown["title"][0])[0] != would_be
    assert catalogue_problems(shown, real, INVENTED) == []


def test_a_catalogue_too_large_is_refused_with_a_way_out(monkeypatch) -> None:
    monkeypatch.setattr("llmrec_assets.ground.catalogue._NOUNS", "keel")
    monkeypatch.setattr("llmrec_assets.ground.catalogue._ADJECTIVES", "pale")
    monkeypatch.setattr("llmrec_assets.ground.catalogue._PLACES", "Quenby")
    with pytest.raises(DataError, match=r"no name is left to invent for film 4 \(3 are taken\)"):
        invented_titles(films([f"zz{i}" for i in range(5)]), 1)


# -- checks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "title", "problem"),
    [
        (1, "Pale Keel (1991)", "movie 2: 'Pale Keel (1991)' has another year than the film"),
        (1, "Pale Net (1990)", "movie 2: 'Pale Net (1990)' contains a real title"),
        (1, "Old Se7en Quay (1990)", "movie 2: 'Old Se7en Quay (1990)' contains a real title"),
        (2, "unknown", "movie 3: 'unknown' contains a real title"),
    ],
)
def test_a_title_that_is_no_invention_is_named(row: int, title: str, problem: str) -> None:
    shown = shown_catalogue(films(), INVENTED, 1)
    shown.loc[row, "title"] = title
    assert catalogue_problems(shown, films(), INVENTED) == [problem]


def test_two_films_of_one_name_and_other_films_are_named() -> None:
    shown = shown_catalogue(films(), INVENTED, 1)
    shown.loc[1, "title"] = split_year(shown["title"][0])[0] + " (1990)"
    (problem,) = catalogue_problems(shown, films(), INVENTED)
    assert problem.startswith("movies [1, 2] share the name ")
    assert "not those of movies" in catalogue_problems(shown[1:], films(), INVENTED)[0]
    (changed,) = catalogue_problems(shown[1:2], films()[1:2], REAL)
    assert changed.endswith("is not the real title")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('["The Net (1995)"]', ["Net, The (1995)"]),
        ('["Net, The (1995)"]', ["Net, The (1995)"]),
        ("Liked: net (1995); X (1990).", ["Net, The (1995)"]),
        ("A fishing net. Films of 1995.", []),  # one word without its year is a word
        ("the genre unknown", []),
        ("HOME ALONE", ["Home Alone (1990)"]),
        ("Home Alone 2 (1992)", ["Home Alone (1990)"]),
        ("at home, not alone", []),
        ("Se7en (1995)", ["Seven (Se7en) (1995)"]),
        ("Seven (1994)", []),
    ],
)
def test_what_counts_as_a_real_title_in_a_text(text: str, found: list[str]) -> None:
    assert RealNames(films()["title"]).shown(text) == found


def test_a_real_title_planted_in_prompt_or_completion_is_found() -> None:
    users = pd.DataFrame({"user_id": [7, 8], "city": ["Paris", None], "state": ["TX", None]})
    prompts = pd.DataFrame(
        {
            "user_id": [7, 8],
            "window_index": [0, 1],
            "prompt": ["from Paris, TX. Liked: Pale Keel (1984).", "Liked: home alone (1990)."],
            "completion": ['["Pale Keel (1990)"]', '["Paris, Texas (1984)"]'],
        }
    )
    assert real_title_problems(prompts, films(), users, REAL) == []
    assert real_title_problems(prompts, films(), users, INVENTED) == [
        "user 8, window 1: the prompt shows the real title 'Home Alone (1990)'",
        "user 8, window 1: the completion shows the real title 'Paris, Texas (1984)'",
    ]


def test_an_address_is_no_title() -> None:
    """San Francisco (1936) is a film of ML-1M, and users live there."""
    movies, user = films(["San Francisco (1936)"]), {"user_id": [7], "state": ["CA"]}
    prompt = {"user_id": [7], "window_index": [0], "completion": ["[]"]}
    asked = "User: male, from San Francisco, CA.\nLiked: {}."
    users = pd.DataFrame({**user, "city": ["San Francisco"]})
    for shown, problems in (("Pale Keel (1936)", 0), ("San Francisco (1936)", 1)):
        prompts = pd.DataFrame({**prompt, "prompt": [asked.format(shown)]})
        assert len(real_title_problems(prompts, movies, users, INVENTED)) == problems
