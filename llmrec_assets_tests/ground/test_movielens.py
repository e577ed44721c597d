"""Both MovieLens formats: what is read, and what is said about rows that cannot be.

Films, users and ratings here are invented: MovieLens rows may not be redistributed.
"""

from __future__ import annotations

import datetime as dt
import os
import time
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from bad_input import (
    DATA,
    ITEM,
    ML_1M,
    ML_100K,
    MOVIES_DAT,
    NO_GENRES,
    RATINGS_DAT,
    USER,
    USERS_DAT,
    BadFile,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_assets.ground import schemas
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.formats import FORMATS
from llmrec_assets.ground.movielens import read_movies, read_ratings, read_users


@pytest.fixture
def ml_100k(tmp_path: Path) -> Path:
    for name, content in (("u.data", DATA), ("u.item", ITEM), ("u.user", USER)):
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def ml_1m(tmp_path: Path) -> Path:
    for name, content in (
        ("ratings.dat", RATINGS_DAT),
        ("movies.dat", MOVIES_DAT),
        ("users.dat", USERS_DAT),
    ):
        (tmp_path / name).write_bytes(content)
    return tmp_path


def all_tables(directory: Path, dataset: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    users, movies = read_users(directory, dataset), read_movies(directory, dataset)
    return read_ratings(directory, dataset, users, movies), movies, users


def complaint(directory: Path, dataset: str = "ml-100k") -> str:
    with pytest.raises(DataError) as raised:
        all_tables(directory, dataset)
    return str(raised.value)


def records(frame: pd.DataFrame, schema: pa.Schema) -> list[tuple]:
    """Rows as plain values, through the declared schema: a wrong type or NULL fails here."""
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    table.validate(full=True)
    assert list(frame.columns) == schema.names
    return [tuple(row.values()) for row in table.to_pylist()]


@pytest.mark.parametrize("dataset", ["ml-100k", "sample"])
def test_ml_100k(ml_100k: Path, dataset: str) -> None:
    ratings, movies, users = all_tables(ml_100k, dataset)
    assert records(ratings, schemas.RATINGS) == [
        (1, 1, 3, 870000000),
        (1, 3, 4, 880000001),
        (1, 7, 1, 880000001),
        (2, 3, 5, 880000002),
    ]
    assert records(movies, schemas.MOVIES) == [
        (1, "Tin Lighthouse, The (1991)", 1991, dt.date(1991, 3, 4), ["Drama"], 1),
        (2, "unknown", None, None, [], 2),
        (
            3,
            "Café at Noon: Part 3 (1989) (1990) (V)",
            1990,
            dt.date(1990, 2, 4),
            ["unknown", "Action"],
            3,
        ),
        (7, "Tin Lighthouse, The (1991)", 1991, dt.date(1991, 3, 5), ["Drama"], 1),
    ]
    assert records(users, schemas.USERS) == [
        (1, 24, None, "M", "technician", "02139", "Cambridge", "MA"),
        (2, 53, None, "F", "other", "V5K0A", None, None),
        (5, 33, None, "F", "writer", "94043-1234", "Mountain View", "CA"),
    ]


def test_ml_1m(ml_1m: Path) -> None:
    ratings, movies, users = all_tables(ml_1m, "ml-1m")
    assert records(ratings, schemas.RATINGS) == [
        (1, 1, 3, 978300759),
        (1, 12, 5, 978300760),
        (2, 1, 4, 978300761),
    ]
    assert records(movies, schemas.MOVIES) == [
        (1, "Kites: A Story (1951)", 1951, None, ["Animation", "Children's"], 1),
        (12, "L'été vert (1972)", 1972, None, [], 12),
    ]
    assert records(users, schemas.USERS) == [
        (1, None, "under 18", "F", "K-12 student", "02139", "Cambridge", "MA"),
        (2, None, "56+", "M", "self-employed", "070072", None, None),
    ]


def test_line_ends_and_blank_lines_at_the_end_are_tolerated(ml_100k: Path) -> None:
    expected = all_tables(ml_100k, "ml-100k")
    for name in FORMATS["ml-100k"].required:
        file = ml_100k / name
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\n")
    for found, before in zip(all_tables(ml_100k, "ml-100k"), expected, strict=True):
        pd.testing.assert_frame_equal(found, before)


def test_numbers_with_spaces_take_the_careful_way_to_the_same_result(ml_100k: Path) -> None:
    expected = all_tables(ml_100k, "ml-100k")[0]
    (ml_100k / "u.data").write_bytes(DATA.replace(b"\t5\t", b"\t 5 \t"))
    pd.testing.assert_frame_equal(all_tables(ml_100k, "ml-100k")[0], expected)


def test_genre_names_come_from_u_genre(ml_100k: Path) -> None:
    (ml_100k / "u.genre").write_bytes(b"Sea|0\nSky|1\n\n")
    (ml_100k / "u.item").write_bytes(b"1|A (1990)|||u|0|1\n3|B|||u|1|1\n7|C|||u|0|0\n")
    genres = read_movies(ml_100k, "sample")["genres"].tolist()
    assert genres == [["Sky"], ["Sea", "Sky"], []]
    (ml_100k / "u.genre").write_bytes(b"Sky|1\nSea|0\n")
    assert "row 1 of u.genre has position '1', expected 0" in complaint(ml_100k)


@pytest.mark.parametrize("case", ML_100K, ids=lambda case: f"{case.file}: {case.what}")
def test_bad_rows_of_ml_100k(ml_100k: Path, case: BadFile) -> None:
    (ml_100k / case.file).write_bytes(case.content)
    message = complaint(ml_100k)
    assert case.said in message
    assert_has_a_remedy(message)


@pytest.mark.parametrize("case", ML_1M, ids=lambda case: f"{case.file}: {case.what}")
def test_bad_rows_of_ml_1m(ml_1m: Path, case: BadFile) -> None:
    (ml_1m / case.file).write_bytes(case.content)
    message = complaint(ml_1m, "ml-1m")
    assert case.said in message
    assert_has_a_remedy(message)


def assert_has_a_remedy(message: str) -> None:
    verbs = ("Correct ", "Restore ", "Convert ", "Keep ", "Write ", "Add ", "Put ", "Make ")
    assert any(f". {verb}" in message for verb in verbs), message


@pytest.mark.parametrize("name", FORMATS["ml-100k"].required)
def test_a_missing_file(ml_100k: Path, name: str) -> None:
    (ml_100k / name).unlink()
    message = complaint(ml_100k)
    assert f"file {name} is missing in {ml_100k}. Put it there, or set LLMREC_DATA_DIR" in message


def test_a_directory_in_a_file_s_place(ml_100k: Path) -> None:
    (ml_100k / "u.user").unlink()
    (ml_100k / "u.user").mkdir()
    assert "cannot be read" in complaint(ml_100k)


def test_a_large_file_names_its_row_with_thousands_separators(ml_100k: Path) -> None:
    (ml_100k / "u.item").write_bytes(
        b"".join(b"%d|Film %d (1990)|||u%s\n" % (i, i, NO_GENRES.encode()) for i in range(1, 6001))
    )
    lines = [b"1\t%d\t3\t880000000" % i for i in range(1, 6001)]
    lines[5011] = b"1\t5012\t3"
    (ml_100k / "u.data").write_bytes(b"\n".join(lines))
    assert complaint(ml_100k).startswith(
        "ratings: row 5,012 of u.data has 3 fields, expected 4 (user, item, rating, timestamp). "
    )


def test_an_unknown_data_set_is_a_programming_error(ml_100k: Path) -> None:
    with pytest.raises(ValueError, match="unknown data set 'ml-20m'"):
        read_users(ml_100k, "ml-20m")


@settings(max_examples=150, deadline=None)
@given(
    file=st.sampled_from(["u.data", "u.item", "u.user"]),
    edits=st.lists(
        st.tuples(st.integers(0, 10**6), st.sampled_from(["set", "insert", "cut"]), st.binary()),
        min_size=1,
        max_size=4,
    ),
)
def test_damaged_bytes_raise_nothing_but_data_errors(
    tmp_path_factory: pytest.TempPathFactory, file: str, edits: list[tuple[int, str, bytes]]
) -> None:
    directory = tmp_path_factory.getbasetemp() / "fuzz"
    directory.mkdir(exist_ok=True)
    whole = {"u.data": DATA, "u.item": ITEM, "u.user": USER}
    content = bytearray(whole[file])
    for position, action, bytes_ in edits:
        at = position % (len(content) + 1)
        keep = {"set": at + len(bytes_), "insert": at, "cut": at + 1 + len(bytes_)}[action]
        content[at:keep] = b"" if action == "cut" else bytes_
    for name, original in whole.items():
        (directory / name).write_bytes(bytes(content) if name == file else original)
    try:
        tables = all_tables(directory, "ml-100k")
    except DataError:
        pass  # refused in words is fine; any other exception fails the test
    else:
        for frame, schema in zip(
            tables, (schemas.RATINGS, schemas.MOVIES, schemas.USERS), strict=True
        ):
            records(frame, schema)


def real_data(dataset: str) -> Path:
    root = Path(__file__).resolve().parents[2]
    named = os.environ.get("LLMREC_DATA_DIR")
    places = ([Path(named)] if named else []) + [root.parent / "shared" / "data"]
    for place in places:
        if all((place / dataset / name).is_file() for name in FORMATS[dataset].required):
            return place / dataset
    pytest.skip(f"{dataset} is not in {' or '.join(map(str, places))}: set LLMREC_DATA_DIR")


def test_the_real_ml_100k() -> None:
    ratings, movies, users = all_tables(real_data("ml-100k"), "ml-100k")
    assert (len(ratings), len(users), len(movies)) == (100_000, 943, 1_682)
    assert (movies["movie_id"] != movies["canonical_movie_id"]).sum() == 18
    assert movies["year"].isna().sum() == 1
    assert users["city"].notna().mean() > 0.95
    for frame, schema in (
        (ratings, schemas.RATINGS),
        (movies, schemas.MOVIES),
        (users, schemas.USERS),
    ):
        pa.Table.from_pandas(frame, schema=schema, preserve_index=False).validate(full=True)


def test_the_real_ml_1m() -> None:
    directory = real_data("ml-1m")
    start = time.perf_counter()
    ratings, movies, users = all_tables(directory, "ml-1m")
    assert time.perf_counter() - start < 10  # a second on a quiet machine
    assert (len(users), len(movies)) == (6_040, 3_883)
    assert len(ratings) in {487_650, 1_000_209}  # the shared part, or the whole
    assert movies["year"].notna().all()
    keys = ratings[["user_id", "timestamp", "movie_id"]]
    assert keys.equals(keys.sort_values(list(keys.columns), ignore_index=True))
