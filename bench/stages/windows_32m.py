"""Reading, windows and prompts of 32 million invented ratings: memory, and how time grows.

As many ratings, users and films as MovieLens 32M has, in ML-1M's format. No peer: pandas' answer to
the same rows is checked on the first users, since a window depends on its own user's rows alone.
The process may not get more than 8 GB of memory of its own (``RLIMIT_DATA``).
"""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from bench.frame import Bench, Comparison, Row, Timer
from bench.ratings import generated
from bench.stages import windows

FULL, USERS, FILMS = 32_000_204, 200_948, 87_585
MAX_BYTES = 8 * 10**9
CHECKED_ROWS = 100_000


def rows(bench: Bench) -> list[Row]:
    small = FULL // 10
    comparison = Comparison(
        stage="windows_32m",
        title="reading + windows + prompts, 32,000,204 invented rows, at most 8 GB",
        prepare=prepare,
        small=small,
        full=FULL,
        ours="ours",
        peers=[],
        check=check,
        # n log n from the small size to the full one
        exponent_goal=1 + math.log(math.log(FULL) / math.log(small)) / math.log(FULL / small),
        memory_goal_mb=MAX_BYTES / 1e6,
    )
    return [comparison.row(Bench(bench.work, min(bench.repeats, 3)))]


def prepare(directory: Path, size: int) -> str:
    generated(directory, size, USERS * size // FULL, FILMS, windows.SEED)
    return f"{size:,} invented rows, {USERS * size // FULL:,} users, {FILMS:,} films"


def ours(inputs: Path, out: Path, timer: Timer) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    windows.ours(inputs, out, timer, rows_kept=CHECKED_ROWS)


def check(inputs: Path, out: Mapping[str, Path]) -> str:
    """The prompts of the first users, beside those that vectorised pandas makes of their rows."""
    (mine,) = out.values()
    some = inputs / "some"
    some.mkdir(exist_ok=True)
    with (inputs / "ratings.dat").open("rb") as file:
        lines = [file.readline() for _ in range(CHECKED_ROWS)]
    last = lines[-1].split(b"::")[0]
    whole = [line for line in lines if line.split(b"::")[0] != last]
    (some / "ratings.dat").write_bytes(b"".join(whole))
    for name in ("users.dat", "movies.dat"):
        (some / name).write_bytes((inputs / name).read_bytes())
    windows.vectorised(some, some, Timer(), rows_kept=CHECKED_ROWS)
    theirs = pd.read_parquet(some / "prompts.parquet")
    ours_ = pd.read_parquet(mine / "prompts.parquet")
    ours_ = ours_[ours_["user_id"] < int(last)].reset_index(drop=True)
    assert len(theirs) > 100
    pd.testing.assert_frame_equal(ours_, theirs)
    return f"The prompts of the first {len(theirs):,} users are those of vectorised pandas"
