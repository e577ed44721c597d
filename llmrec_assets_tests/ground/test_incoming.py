"""Rating files that arrive: taken in whole or put aside, nothing lost and nothing counted twice."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bad_input import HEADER, INCOMING, BadFile, T
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_assets.ground import incoming, incoming_files
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.incoming import merged, take_in
from llmrec_assets.ground.schemas import RATINGS
from llmrec_assets.ground.tables import conform, content_version

USERS = pd.DataFrame({"user_id": [1, 2, 3]})
MOVIES = pd.DataFrame({"movie_id": [10, 20, 30]})


def frame(*rows: tuple[int, int, int, int]) -> pd.DataFrame:
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    return incoming.rating_frame(list(columns))


def drop(place: Path, name: str, text: str | bytes) -> Path:
    """A file that has been lying there for a minute."""
    place.mkdir(parents=True, exist_ok=True)
    path = place / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    os.utime(path, (time.time() - 60,) * 2)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "incoming" / "sample"


def take(place: Path) -> incoming.TakenIn:
    return take_in(place, "sample", USERS, MOVIES, lambda line: None)


def rows_of(taken: incoming.TakenIn) -> list[tuple[int, ...]]:
    return [tuple(map(int, row)) for row in taken.ratings.itertuples(index=False)]


def test_nothing_there_is_an_empty_table_of_the_schema(place: Path) -> None:
    taken = take(place)
    assert len(taken.ratings) == 0
    conform(taken.ratings, RATINGS, "incoming_ratings")
    assert (taken.accepted, taken.quarantined, taken.left) == ([], {}, [])
    assert sorted(path.name for path in place.glob("[!.]*")) == ["accepted", "quarantine"]


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}1,10,5,{T}\n2,20,3,{T + 1}\n",
        f"{HEADER}1,10,5,{T}\r\n2,20,3,{T + 1}",
        f"rating,timestamp,item_id,user_id\n5,{T},10,1\n3,{T + 1},20,2\n",
        f"userId,movieId,rating,timestamp\n1,10,5,{T}\n2,20,3,{T + 1}\n",
        f"user_id\titem_id\trating\ttimestamp\n1\t10\t5\t{T}\n2\t20\t3\t{T + 1}\n",
        f"1\t10\t5\t{T}\n2\t20\t3\t{T + 1}\n",
        f"1::10::5::{T}\n2::20::3::{T + 1}\n",
    ],
    ids=["csv", "crlf", "other-order", "ml-25m", "tabs", "u.data", "ratings.dat"],
)
def test_every_format_gives_the_same_ratings(place: Path, text: str) -> None:
    drop(place, "new.csv", text)
    taken = take(place)
    assert rows_of(taken) == [(1, 10, 5, T), (2, 20, 3, T + 1)]
    assert [path.name for path in place.iterdir() if path.is_file() and path.name[0] != "."] == []
    conform(taken.ratings, RATINGS, "incoming_ratings")


def test_an_accepted_file_is_kept_and_read_again(place: Path) -> None:
    drop(place, "new.csv", f"{HEADER}1,10,5,{T}\n")
    (name,) = take(place).accepted
    assert name.endswith("-new.csv")
    again = take(place)
    assert again.accepted == [name]
    assert rows_of(again) == [(1, 10, 5, T)]


def test_the_same_file_again_counts_once_under_any_name(place: Path) -> None:
    text = f"{HEADER}1,10,5,{T}\n"
    drop(place, "new.csv", text)
    take(place)
    drop(place, "new.csv", text)
    drop(place, "copy.csv", text)
    taken = take(place)
    assert rows_of(taken) == [(1, 10, 5, T)]
    assert len(taken.accepted) == 2


@pytest.mark.parametrize("case", INCOMING, ids=lambda case: case.what)
def test_a_bad_file_is_quarantined_with_its_reason_and_the_rest_goes_on(
    place: Path, case: BadFile
) -> None:
    drop(place, case.file, case.content)
    drop(place, "good.csv", f"{HEADER}2,20,3,{T}\n")
    taken = take(place)
    assert rows_of(taken) == [(2, 20, 3, T)]
    assert case.said in taken.quarantined["bad.csv"]
    ((name, reason),) = incoming_files.quarantined_files(place).items()
    assert (place / "quarantine" / name).read_bytes() == case.content
    assert case.said in reason
    assert "bad.csv" in reason and "move the file back to incoming/sample" in reason


def test_a_corrected_file_moved_back_is_taken_in_and_its_reason_goes(place: Path) -> None:
    drop(place, "new.csv", f"{HEADER}1,10,7,{T}\n")
    take(place)
    ((name, _),) = incoming_files.quarantined_files(place).items()
    (place / "quarantine" / name).unlink()
    drop(place, "new.csv", f"{HEADER}1,10,4,{T}\n")
    assert rows_of(take(place)) == [(1, 10, 4, T)]
    assert list((place / "quarantine").iterdir()) == []


def test_files_under_one_name_do_not_overwrite_each_other(place: Path) -> None:
    for rating in (6, 7):
        drop(place, "new.csv", f"{HEADER}1,10,{rating},{T}\n")
        take(place)
    for movie in (10, 20):
        drop(place, "new.csv", f"{HEADER}1,{movie},5,{T}\n")
        take(place)
    assert len(incoming_files.quarantined_files(place)) == 2
    assert len(incoming_files.accepted_files(place)) == 2


def test_what_is_no_plain_file_or_hidden_is_left(place: Path, tmp_path: Path) -> None:
    target = drop(tmp_path, "elsewhere.csv", f"{HEADER}1,10,5,{T}\n")
    drop(place, ".upload.csv", f"{HEADER}1,10,5,{T}\n")
    (place / "link.csv").symlink_to(target)
    (place / "folder").mkdir()
    os.mkfifo(place / "pipe")
    drop(place, os.fsdecode(b"caf\xe9.csv"), f"{HEADER}1,10,5,{T}\n")
    taken = take(place)
    assert taken.left == ["caf\\udce9.csv", "folder", "link.csv", "pipe"]
    assert len(taken.ratings) == 0
    assert target.exists()


def test_a_file_that_is_being_written_is_waited_for_and_then_left(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    path = drop(place, "new.csv", f"{HEADER}1,10,5,{T}\n")

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        path.touch()  # its writer goes on

    monkeypatch.setattr(time, "sleep", sleep)
    path.touch()
    assert take(place).left == ["new.csv"]
    assert 4 < waited[0] <= incoming_files.SETTLE_SECONDS
    monkeypatch.undo()
    os.utime(path, (time.time() - incoming_files.SETTLE_SECONDS,) * 2)
    assert len(take(place).accepted) == 1


def test_another_machines_clock_does_not_keep_a_file_waiting(place: Path) -> None:
    path = drop(place, "new.csv", f"{HEADER}1,10,5,{T}\n")
    os.utime(path, (time.time() + 3600,) * 2)
    assert len(take(place).accepted) == 1


@pytest.mark.parametrize("name", ["x" * 255, "a b'c;d&e.csv", "ünïcode.csv", "new.reason.txt"])
def test_any_name_is_kept(place: Path, name: str) -> None:
    drop(place, name, f"{HEADER}1,10,5,{T}\n")
    assert len(take(place).accepted) == 1
    bad = drop(place, name, f"{HEADER}1,10,9,{T}\n").read_bytes()
    assert len(take(place).quarantined) == 1
    take(place)
    ((kept, reason),) = incoming_files.quarantined_files(place).items()
    assert (place / "quarantine" / kept).read_bytes() == bad and "rating" in reason


def test_an_accepted_file_that_was_changed_is_refused_by_name(place: Path) -> None:
    drop(place, "new.csv", f"{HEADER}1,10,5,{T}\n")
    (name,) = take(place).accepted
    with (place / "accepted" / name).open("a") as file:
        file.write(f"1,20,5,{T}\n")
    with pytest.raises(DataError, match=f"{name} is not what was accepted under this name"):
        take(place)


def test_an_accepted_rating_of_a_user_who_is_gone_is_named(place: Path) -> None:
    drop(place, "new.csv", f"{HEADER}3,10,5,{T}\n")
    take(place)
    with pytest.raises(DataError, match=r"accepted: ratings: row 2 of .*new\.csv names user 3"):
        take_in(place, "sample", USERS.iloc[:2], MOVIES, lambda line: None)


# -- merging ------------------------------------------------------------------------------


def test_the_latest_rating_of_a_film_counts() -> None:
    found = merged([frame((1, 10, 2, T), (1, 20, 3, T + 5)), frame((1, 10, 4, T + 9))])
    assert found.to_numpy().tolist() == [[1, 20, 3, T + 5], [1, 10, 4, T + 9]]
    # also when it arrives before an older one
    late = merged([frame((1, 10, 4, T + 9)), frame((1, 10, 2, T))])
    assert late.to_numpy().tolist() == [[1, 10, 4, T + 9]]


def test_at_the_same_second_an_incoming_rating_corrects_the_original() -> None:
    assert merged([frame((1, 10, 5, T)), frame((1, 10, 2, T))])["rating"].tolist() == [2]
    assert merged([frame((1, 10, 2, T), (1, 10, 5, T))])["rating"].tolist() == [5]


def test_nothing_incoming_leaves_the_ratings_as_they_are() -> None:
    original = frame((1, 10, 5, T), (1, 20, 3, T), (2, 10, 1, T - 5))
    both = merged([original, merged([])])
    assert content_version(conform(both, RATINGS, "ratings")) == content_version(
        conform(original, RATINGS, "ratings")
    )


RATING = st.tuples(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([10, 20, 30]),
    st.integers(1, 5),
    st.integers(T, T + 3),
)


@settings(max_examples=30, deadline=None)
@given(
    files=st.lists(st.lists(RATING, min_size=1, max_size=6), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_order_of_arrival_and_of_rows_does_not_matter(
    files: list[list[tuple[int, ...]]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shuffled = random.Random(seed)

    def table(in_one_go: bool) -> tuple[str, list[tuple[int, ...]]]:
        place = tmp_path_factory.mktemp("place")
        order = shuffled.sample(files, len(files))
        for number, rows in enumerate(order):
            lines = [",".join(map(str, row)) for row in shuffled.sample(rows, len(rows))]
            drop(place, f"{number}.csv", HEADER + "\n".join(lines) + "\n")
            if not in_one_go:
                take(place)
        taken = take(place)
        shutil.rmtree(place)
        version = content_version(conform(taken.ratings, RATINGS, "incoming_ratings"))
        return version, rows_of(taken)

    version, rows = table(in_one_go=True)
    assert table(in_one_go=False) == (version, rows)
    # against a plain loop
    best: dict[tuple[int, int], tuple[int, int]] = {}
    for user, movie, rating, when in itertools.chain(*files):
        best[user, movie] = max(best.get((user, movie), (0, 0)), (when, rating))
    expected = {(u, m, rating, when) for (u, m), (when, rating) in best.items()}
    assert set(rows) == expected and len(rows) == len(expected)


# -- kills --------------------------------------------------------------------------------


class CrashError(Exception):
    pass


@contextlib.contextmanager
def crash(at: int, *, after: bool) -> Iterator[None]:
    """``os.replace`` or a write of a reason fails at its ``at``-th call, before or after it."""
    calls = itertools.count()
    replace, write = os.replace, Path.write_text

    def dying(real: Callable) -> Callable:
        def call(*arguments, **keywords):
            if next(calls) != at:
                return real(*arguments, **keywords)
            if after:
                real(*arguments, **keywords)
            raise CrashError

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dying(replace))
        patch.setattr(Path, "write_text", dying(write))
        yield


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(4))
def test_a_kill_loses_nothing_and_counts_nothing_twice(place: Path, at: int, after: bool) -> None:
    drop(place, "a.csv", f"{HEADER}1,10,5,{T}\n")
    drop(place, "b.csv", f"{HEADER}1,10,9,{T}\n")
    drop(place, "c.csv", f"{HEADER}2,20,3,{T}\n")
    with crash(at, after=after), pytest.raises(CrashError):
        take(place)
    taken = take(place)
    assert rows_of(taken) == [(1, 10, 5, T), (2, 20, 3, T)]
    assert len(taken.accepted) == 2
    ((name, reason),) = incoming_files.quarantined_files(place).items()
    assert name.endswith("b.csv") and "rating 9" in reason
    assert len(list((place / "quarantine").iterdir())) == 2


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200), prefix=st.sampled_from(["", HEADER, "1::10::5::880000000"]))
def test_whatever_arrives_is_taken_or_put_aside_whole(
    content: bytes, prefix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("place")
    drop(place, "any.csv", prefix.encode() + content)
    taken = take(place)
    kept = [*incoming_files.accepted_files(place), *(place / "quarantine").glob("*any.csv")]
    assert [path.read_bytes() for path in kept] == [prefix.encode() + content]
    assert len(taken.accepted) + len(taken.quarantined) == 1
    conform(taken.ratings, RATINGS, "incoming_ratings")
    shutil.rmtree(place)
