import hashlib

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.leaks import user_split_problems
from llmrec_assets.ground.recipes import SplitRecipe, WindowRecipe
from llmrec_assets.ground.splits import split_users, temporal_split_time


def _by_user(*args) -> dict[int, str]:
    table = split_users(*args)
    return dict(zip(table["user_id"], table["split"], strict=True))


def test_a_split_is_the_hash_against_the_cumulated_shares() -> None:
    recipe = SplitRecipe(train=0.5, validation=0.25, test=0.25)
    for user, split in _by_user(range(200), recipe, 7).items():
        digest = hashlib.blake2b(f"7:{user}".encode(), digest_size=8).digest()
        position = int.from_bytes(digest, "big") / 2**64
        expected = "train" if position < 0.5 else "validation" if position < 0.75 else "test"
        assert split == expected


def test_shares_hold_roughly_and_rows_are_ordered_without_repeats() -> None:
    table = split_users([*range(4999, -1, -1), 3, 3], SplitRecipe(), 0)
    assert table["user_id"].tolist() == list(range(5000))
    shares = table["split"].value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.70, abs=0.03)
    assert shares["validation"] == pytest.approx(0.15, abs=0.03)
    assert user_split_problems(table) == []


@given(st.sets(st.integers(1, 10**6)), st.sets(st.integers(1, 10**6)), st.integers(0, 9))
def test_new_users_move_no_old_one(old: set[int], new: set[int], seed: int) -> None:
    before = _by_user(old, SplitRecipe(), seed)
    after = _by_user(old | new, SplitRecipe(), seed)
    assert {user: after[user] for user in before} == before


def test_seed_matters() -> None:
    assert _by_user(range(99), SplitRecipe(), 0) != _by_user(range(99), SplitRecipe(), 1)


def test_a_split_with_no_share_gets_nobody() -> None:
    only = _by_user(range(999), SplitRecipe(train=0.1 + 0.2, validation=0.7, test=0), 0)
    assert set(only.values()) == {"train", "validation"}


def test_no_users_is_an_empty_table() -> None:
    table = split_users([], SplitRecipe(), 0)
    assert len(table) == 0
    assert table["user_id"].dtype == "int32"


# -- the global time of the protocol temporal -----------------------------------------------


def _rated(*times: int) -> pd.DataFrame:
    return pd.DataFrame(
        {"user_id": range(1, len(times) + 1), "movie_id": 1, "rating": 5, "timestamp": times}
    )


@pytest.mark.parametrize(
    ("quantile", "expected"), [(0.2, 10), (0.21, 20), (0.5, 20), (0.8, 20), (0.81, 40)]
)
def test_the_global_time_is_the_first_by_which_the_share_of_ratings_was_made(
    quantile: float, expected: int
) -> None:
    recipe = WindowRecipe(protocol="temporal", temporal_quantile=quantile)
    assert temporal_split_time(_rated(20, 40, 10, 20, 20), recipe) == expected


def test_an_explicit_time_wins_and_the_user_split_has_none() -> None:
    explicit = WindowRecipe(protocol="temporal", temporal_time=7)
    assert temporal_split_time(_rated(20, 40), explicit) == 7
    assert temporal_split_time(_rated(), explicit) == 7
    assert temporal_split_time(_rated(20, 40), WindowRecipe(temporal_time=7)) is None
    with pytest.raises(DataError, match="has no rating to find its global time in"):
        temporal_split_time(_rated(), WindowRecipe(protocol="temporal"))
