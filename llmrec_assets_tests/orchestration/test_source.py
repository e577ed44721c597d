"""The source assets over bad and over new files: what was published stays, what arrives counts."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import pytest
from bad_input import HEADER

if TYPE_CHECKING:
    from conftest import Home

PROJECT = Path(__file__).resolve().parents[2]
SOURCE = ("movielens_files", "users", "movies", "incoming_ratings", "ratings")


@pytest.fixture
def sourced(
    new_home: Callable[..., Home], tmp_path: Path
) -> Iterator[tuple[Home, dg.DagsterInstance]]:
    """The sample, copied so that a test may spoil it, and its tables."""
    shutil.copytree(PROJECT / "data" / "sample", tmp_path / "sample")
    home = replace(new_home(), sample_dir=tmp_path / "sample")
    with home.instance() as instance:
        assert run(home, instance).success
        yield home, instance


def run(home: Home, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    return home.materialize(instance, *SOURCE, job="source_data", partition="sample")


def in_force(home: Home) -> dict[str, str]:
    return home.current("sample") | home.current("sample", "checkpoints")


@pytest.mark.parametrize(
    ("file", "row", "said"),
    [
        ("u.data", "1\t5\tgood\t1200566006\n", "row 24,877 of u.data has rating 'good'"),
        ("u.item", "9999|Untitled\n", "row 261 of u.item has 2 fields"),
        ("u.user", "9999|33|F|writer\n", "row 501 of u.user has 4 fields"),
    ],
)
def test_a_bad_file_publishes_nothing_and_what_was_published_stays(
    sourced: tuple[Home, dg.DagsterInstance], file: str, row: str, said: str
) -> None:
    home, instance = sourced
    before = in_force(home)
    ratings = home.store.read_table("ratings", "sample").frame
    with (home.sample_dir / file).open("a", encoding="latin-1") as opened:
        opened.write(row)
    failed = run(home, instance)
    assert not failed.success
    (event,) = failed.filter_events(lambda event: event.is_step_failure)
    assert event.step_key == "movielens_files"
    assert said in str(event.step_failure_data.error)
    assert in_force(home) == before
    assert home.store.read_table("ratings", "sample").frame.equals(ratings)
    home.store.checkpoint("movielens_files", "sample")
    published = home.location / "checkpoints" / "movielens_files" / "sample"
    assert len([path for path in published.iterdir() if path.is_dir()]) == 1


def test_incoming_ratings_are_merged_and_a_bad_file_beside_them_warns(
    sourced: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = sourced
    before = home.store.read_table("ratings", "sample")
    first = before.frame.iloc[0]
    later = int(before.frame["timestamp"].max()) + 60
    known = set(before.frame.loc[before.frame["user_id"] == 1, "movie_id"])
    films = home.store.read_table("movies", "sample").frame["movie_id"]
    unseen = next(movie for movie in films if movie not in known)
    place = home.location / "incoming" / "sample"
    for name, text in (
        ("good.csv", f"{HEADER}1,{unseen},5,{later}\n1,{first['movie_id']},1,{later + 1}\n"),
        ("bad.csv", f"{HEADER}1,{unseen},7,{later}\n"),
    ):
        (place / name).write_text(text)
        os.utime(place / name, (time.time() - 60,) * 2)
    result = run(home, instance)
    assert result.success
    after = home.store.read_table("ratings", "sample")
    assert after.version != before.version
    assert len(after.frame) == len(before.frame) + 1
    of_user = after.frame[after.frame["user_id"] == 1]
    assert of_user.tail(2).to_numpy().tolist() == [
        [1, unseen, 5, later],
        [1, int(first["movie_id"]), 1, later + 1],
    ]
    assert of_user["movie_id"].is_unique
    (check,) = result.get_asset_check_evaluations()
    assert (check.check_name, check.passed) == ("nothing_quarantined", False)
    assert check.severity == dg.AssetCheckSeverity.WARN
    assert "row 2 of bad.csv has rating 7, expected 1 to 5" in str(check.metadata)
    (event,) = [
        event
        for event in result.get_asset_materialization_events()
        if event.asset_key == dg.AssetKey("ratings")
    ]
    assert event.materialization.metadata["added_by_incoming_files"].value == 1

    # taken out again, the ratings are what they were
    for path in (place / "accepted").iterdir():
        path.unlink()
    assert run(home, instance).success
    assert home.store.current("ratings", "sample", "tables") == before.version
