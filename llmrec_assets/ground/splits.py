"""Which users train, validate and test, and until when training may look.

What belongs here: the user split and the protocol ``temporal``'s global time. What does not:
windows and their cut-offs (``windows``) and the checks that nothing leaks across (``leaks``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pandas as pd

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.recipes import SplitRecipe, WindowRecipe

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


def temporal_split_time(ratings: pd.DataFrame, recipe: WindowRecipe) -> int | None:
    """The global time T of the protocol ``temporal``; ``None`` under ``user-split``.

    A temporal split by one global time keeps events of other users' future out of training, which
    a user split alone does not (Meng et al., "Exploring Data Splitting Strategies for the
    Evaluation of Recommendation Models", RecSys 2020). T is the earliest rating time by which at
    least ``temporal_quantile`` of all ratings (of every user: T is part of the protocol, not of
    what is learned) were made, or ``temporal_time`` where the recipe names it.

    Args:
        ratings: ``RATINGS``, all of the data set, in any order.
        recipe: protocol, quantile and explicit time.

    Returns:
        Unix seconds.

    Raises:
        DataError: there is no rating to take a quantile of.
    """
    if recipe.protocol != "temporal":
        return None
    if recipe.temporal_time is not None:
        return recipe.temporal_time
    if ratings.empty:
        raise DataError(
            "windows: the protocol temporal has no rating to find its global time in: "
            "materialize ratings again, or name windows.temporal_time in the recipe"
        )
    made = ratings["timestamp"].value_counts().sort_index().cumsum()
    return int(made.index[made >= recipe.temporal_quantile * len(ratings)][0])


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
