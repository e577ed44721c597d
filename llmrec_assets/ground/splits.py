"""Which users train, validate and test.

What belongs here: the user split. What does not: windows and their cut-offs (``windows``) and
the checks that nothing leaks across (``leaks``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pandas as pd

from llmrec_assets.ground.recipes import SplitRecipe

SPLITS = ("train", "validation", "test")


def split_users(user_ids: Iterable[int], recipe: SplitRecipe, seed: int) -> pd.DataFrame:
    """Splits users by a seeded stable hash (paper §3.2 splits by user).

    A user's split depends on the seed, the shares and the user id alone, so a new user never
    moves an old one. The shares hold in expectation, not exactly.

    Args:
        user_ids: user ids; repeats are ignored, order does not matter.
        recipe: shares of the three splits.
        seed: seed of the split.

    Returns:
        One row per distinct user in the schema ``USER_SPLITS``, ordered by user id.
    """
    users = sorted({int(user_id) for user_id in user_ids})
    splits = [_split_of(_uniform(seed, user), recipe) for user in users]
    return pd.DataFrame(
        {
            "user_id": pd.Series(users, dtype="int32"),
            "split": pd.Series(splits, dtype="str"),
        }
    )


def _uniform(seed: int, user_id: int) -> float:
    """A number in [0, 1) that depends on its arguments alone, on every platform."""
    digest = hashlib.blake2b(f"{seed}:{user_id}".encode(), digest_size=8).digest()
    # 53 bits fit a float exactly; all 64 could round up to 1.0
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _split_of(position: float, recipe: SplitRecipe) -> str:
    shares = [(split, getattr(recipe, split)) for split in SPLITS if getattr(recipe, split) > 0]
    upper = 0.0
    for split, share in shares[:-1]:
        upper += share
        if position < upper:
            return split
    # the last split takes what is left, so that rounding in the sum can open no gap
    return shares[-1][0]
