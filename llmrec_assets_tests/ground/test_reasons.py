"""Reasons: counted by hand."""

from __future__ import annotations

import pandas as pd

from llmrec_assets.ground.reasons import Reasons

CATALOGUE = pd.DataFrame(
    {
        "movie_id": [1, 2, 3, 4, 5, 6],
        "title": ["Heat (1995)", "Fargo (1996)", "Up (2009)", "Alien (1979)", "M (1931)", "M (1)"],
        "genres": [["Crime"], ["Crime", "Drama"], ["Animation"], ["Horror"], ["Crime"], ["War"]],
        "canonical_movie_id": [1, 2, 3, 4, 5, 5],
    }
)


def ratings(likes: dict[int, list[int]], stars: int = 4) -> pd.DataFrame:
    rows = [(user, film, stars, 0) for user, films in likes.items() for film in films]
    return pd.DataFrame(rows, columns=["user_id", "movie_id", "rating", "timestamp"])


HISTORY = ratings({99: [1, 3]})


def test_the_film_whose_admirers_also_liked_it() -> None:
    likes = {1: [1, 2], 2: [1, 2], 3: [1], 4: [3], 5: [3], 6: [2, 3]}
    said = Reasons(ratings(likes), CATALOGUE, 3).reason(2, HISTORY)
    # Heat: 2 of 3, 2 / (sqrt(3 * 3) + 10); Up: 1 of 3
    assert said == ("liked Heat (1995): so did 3 others, of whom 2 liked this too")


def test_one_common_admirer_does_not_outweigh_many() -> None:
    likes = {u: [1, 2] for u in range(3)} | {3: [3, 2]} | {u: [1] for u in range(10, 17)}
    # cosines: Heat 3 / sqrt(10 * 4) = 0.47, Up 1 / sqrt(1 * 4) = 0.5; shrunk: 0.18 and 0.08
    said = Reasons(ratings(likes), CATALOGUE, 3).reason(2, HISTORY)
    assert said == "liked Heat (1995): so did 10 others, of whom 3 liked this too"


def test_the_asking_users_own_ratings_do_not_count() -> None:
    likes = {7: [1], 8: [1, 2]}
    reasons = Reasons(ratings(likes), CATALOGUE, 3)
    alone = reasons.reason(2, ratings({7: [1]}), asking=7)
    assert alone.endswith("did 1 other, of whom 1 liked this too")
    assert reasons.reason(2, ratings({7: [1]})).endswith("2 others, of whom 1 liked this too")


def test_without_a_common_admirer_genres_are_compared() -> None:
    reasons = Reasons(ratings({1: [2]}), CATALOGUE, 3)
    assert reasons.reason(2, HISTORY) == "liked Heat (1995): this is Crime too"
    assert reasons.reason(4, HISTORY) == (
        "no liked film in the history is like this, by who liked both or by genre"
    )


def test_a_history_without_a_liked_film_says_so() -> None:
    reasons = Reasons(ratings({1: [1, 2]}), CATALOGUE, 3)
    said = reasons.reason(2, ratings({99: [1]}, stars=2))
    assert said == "no film in the history was liked, so there is none to compare this with"


def test_a_film_under_two_ids_is_one_film() -> None:
    reasons = Reasons(ratings({1: [6, 2], 2: [5, 2]}), CATALOGUE, 3)
    assert reasons.reason(2, ratings({99: [6]})) == (
        "liked M (1931): so did 2 others, of whom 2 liked this too"
    )
