import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec_assets.ground.leaks import user_split_problems
from llmrec_assets.ground.recipes import SplitRecipe
from llmrec_assets.ground.splits import split_users


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
