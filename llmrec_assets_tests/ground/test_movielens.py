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
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_assets.ground import schemas
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.movielens import FORMATS, read_movies, read_ratings, read_users

NO_GENRES = "|0" * 19
DRAMA = "|0" * 8 + "|1" + "|0" * 10
ITEM = (
    f"1|Tin Lighthouse, The (1991)|04-Mar-1991||http://x.invalid/1{DRAMA}\n"
    f"2|unknown|||{NO_GENRES}\n"
    f"3|Caf\xe9 at Noon: Part 3 (1989) (1990) (V)  |4-Feb-1990||{'|1' * 2 + '|0' * 17}\n"
    f"7|Tin Lighthouse, The (1991) |05-Mar-1991||{DRAMA}\n"
).encode("latin-1")
USER = b"1|24|M|technician|02139\n2|53|F|other|V5K0A\n5|33|F|writer|94043-1234\n"
DATA = b"2\t3\t5\t880000002\n1\t7\t1\t880000001\n1\t3\t4\t880000001\n1\t1\t3\t870000000\n"

MOVIES_DAT = b"1::Kites: A Story (1951)::Animation|Children's\n12::L'\xe9t\xe9 vert (1972)::\n"
USERS_DAT = b"1::F::1::10::02139\n2::M::56::16::070072\n"
RATINGS_DAT = b"1::12::5::978300760\n2::1::4::978300761\n1::1::3::978300759\n"


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


BAD_ROWS = [
    # file, content, what the message holds
    ("u.data", DATA + b"1\t2\t3\n", "row 5 of u.data has 3 fields, expected 4 (user, item, rating"),
    ("u.data", DATA + b"1\t2\t3\t4\t5\n", "row 5 of u.data has 5 fields, expected 4"),
    ("u.data", DATA.replace(b"\t", b"::"), "row 1 of u.data has 1 field, expected 4"),
    ("u.data", DATA.replace(b"\n", b"\n\n", 1), "row 2 of u.data is blank, expected 4"),
    ("u.data", DATA.replace(b"\t4\t", b"\tfour\t"), "row 3 of u.data has rating 'four', expected"),
    ("u.data", DATA.replace(b"\t4\t", b"\t4.5\t"), "row 3 of u.data has rating '4.5', expected"),
    ("u.data", DATA.replace(b"\t4\t", b"\t\t"), "row 3 of u.data has rating '', expected"),
    ("u.data", DATA.replace(b"\t4\t", b"\t0\t"), "row 3 of u.data has rating 0, expected 1 to 5"),
    ("u.data", DATA.replace(b"\t4\t", b"\t999\t"), "row 3 of u.data has rating 999, expected 1"),
    ("u.data", DATA.replace(b"\t4\t", b"\t" + b"9" * 50 + b"\t"), "row 3 of u.data has rating '99"),
    ("u.data", DATA.replace(b"\t4\t", b"\t\xb2\t"), "row 3 of u.data has rating '²', expected"),
    ("u.data", DATA.replace(b"\t87", b"\t-87"), "row 4 of u.data has timestamp -870000000"),
    ("u.data", DATA.replace(b"002\n", b"002000\n"), "row 1 of u.data has timestamp 880000002000"),
    ("u.data", DATA.replace(b"880000001", b"0"), "row 2 of u.data has timestamp 0, expected Unix"),
    ("u.data", DATA.replace(b"880000001", b"0"), "(2 such rows)"),
    ("u.data", DATA.replace(b"2\t3", b"9\t3"), "row 1 of u.data names user 9, which u.user does"),
    ("u.data", DATA.replace(b"2\t3", b"2\t9"), "row 1 of u.data names movie 9, which u.item does"),
    ("u.data", DATA + b"1\t7\t5\t9\n", "row 5 of u.data repeats user 1 and movie 7 of row 2."),
    ("u.data", b"", "u.data is empty (no row 1)"),
    ("u.data", b" \n\n", "u.data is empty (no row 1)"),
    ("u.data", b"\xef\xbb\xbf" + DATA, "row 1 of u.data shows that the file is UTF-8 with a byte"),
    ("u.data", DATA.decode().encode("utf-16"), "row 1 of u.data shows that the file is UTF-16"),
    ("u.data", DATA.decode().encode("utf-16-le"), "row 1 of u.data shows that the file is UTF-16"),
    ("u.data", DATA[:-3] + b"\0" * 3, "row 4 of u.data shows that the file is UTF-16 or binary"),
    ("u.item", ITEM.decode("latin-1").encode(), "row 3 of u.item shows that the file is UTF-8,"),
    ("u.item", ITEM.decode("latin-1").encode(), "iconv -f utf-8 -t latin1 u.item"),
    ("u.item", ITEM + ITEM[:80], "row 5 of u.item has"),
    ("u.item", ITEM.replace(b"7|", b"1|", 1), "row 4 of u.item repeats id 1 of row 1."),
    ("u.item", ITEM.replace(b"7|", b"0|", 1), "row 4 of u.item has id 0, expected 1 to"),
    ("u.item", ITEM.replace(b"7|", b"x|", 1), "row 4 of u.item has id 'x', expected a whole"),
    ("u.item", ITEM.replace(b"|unknown|", b"| |"), "row 2 of u.item has no title"),
    ("u.item", ITEM.replace(b"|1|0", b"|7|0", 1), "row 1 of u.item has genre flag '7', expected"),
    ("u.item", ITEM.replace(b"04-Mar", b"31-Feb"), "row 1 of u.item has release date '31-Feb-1991"),
    ("u.item", ITEM.replace(b"04-Mar", b"04-M\xe4r"), "row 1 of u.item has release date '04-Mär-"),
    ("u.user", USER.replace(b"5|33", b"1|33"), "row 3 of u.user repeats id 1 of row 1."),
    ("u.user", USER.replace(b"|33|", b"|333|"), "row 3 of u.user has age 333, expected 1 to 120"),
    ("u.user", USER.replace(b"|33|", b"||"), "row 3 of u.user has age '', expected a whole"),
    ("u.user", USER.replace(b"|F|w", b"|X|w"), "row 3 of u.user has gender 'X', expected M or F"),
    ("u.user", USER.replace(b"writer", b""), "row 3 of u.user has no occupation"),
    ("u.user", USER.replace(b"|other", b""), "row 2 of u.user has 4 fields, expected 5 (user, age"),
]


@pytest.mark.parametrize(("file", "content", "expected"), BAD_ROWS)
def test_bad_rows_of_ml_100k(ml_100k: Path, file: str, content: bytes, expected: str) -> None:
    (ml_100k / file).write_bytes(content)
    message = complaint(ml_100k)
    assert expected in message
    assert_has_a_remedy(message)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (
            "ratings.dat",
            RATINGS_DAT + b"1::2::3\n",
            "row 4 of ratings.dat has 3 fields, expected 4",
        ),
        ("ratings.dat", b"1:::12::5::9\n", "row 1 of ratings.dat has item ':12', expected a whole"),
        ("ratings.dat", b"1\t1\t5\t9\n", "row 1 of ratings.dat has 1 field, expected 4"),
        (
            "ratings.dat",
            RATINGS_DAT.replace(b"::4::", b"::6::"),
            "row 2 of ratings.dat has rating 6",
        ),
        ("movies.dat", b"1::A (1990)\n", "row 1 of movies.dat has 2 fields, expected 3 (id, title"),
        ("movies.dat", MOVIES_DAT.decode("latin-1").encode(), "row 2 of movies.dat shows that the"),
        ("users.dat", USERS_DAT.replace(b"::1::", b"::2::"), "row 1 of users.dat has age code 2,"),
        ("users.dat", USERS_DAT.replace(b"::16::", b"::21::"), "row 2 of users.dat has occupation"),
    ],
)
def test_bad_rows_of_ml_1m(ml_1m: Path, file: str, content: bytes, expected: str) -> None:
    (ml_1m / file).write_bytes(content)
    message = complaint(ml_1m, "ml-1m")
    assert expected in message
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
