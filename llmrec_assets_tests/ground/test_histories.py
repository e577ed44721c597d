"""Histories that ask for recommendations: read in three formats, refused with row and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.histories import Histories, known_histories, read_histories
from llmrec_assets.ground.recommendations import typed
from llmrec_assets.ground.schemas import RATINGS, USERS

CATALOGUE = pd.DataFrame(
    {
        "movie_id": [1, 2, 3, 4],
        "title": ["Heat (1995)", "Net, The (1995)", "Fargo (1996)", "Heat (1986)"],
        "year": [1995, 1995, 1996, 1986],
        "genres": [["Crime"]] * 4,
        "canonical_movie_id": [1, 2, 3, 4],
    }
)
RATED = pd.DataFrame(
    {"user_id": [1, 1], "movie_id": [1, 3], "rating": [5, 2], "timestamp": [10, 90]}
)
USER_ROWS = typed(
    pd.DataFrame({name: None for name in USERS.names}, index=range(2)).assign(
        user_id=[1, 2], gender="F", occupation="writer", zip_code="x"
    ),
    USERS,
)


def read(path: Path) -> Histories:
    return read_histories(path, RATED, USER_ROWS, CATALOGUE, "sample")


def csv(directory: Path, text: str) -> Path:
    path = directory / "histories.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_known_user_asks_with_all_they_have_rated() -> None:
    found = known_histories([1], RATED, USER_ROWS, "sample")
    assert found.labels == {1: "1"} and found.of_data_set
    assert found.ratings["movie_id"].tolist() == [1, 3]
    assert found.users["occupation"].tolist() == ["writer"]


@pytest.mark.parametrize(
    ("user", "said"),
    [
        (7, "user 7 is not in sample (its users are 1 to 2); give a history in a file"),
        (2, "user 2 has rated nothing in sample, so there is no history to ask with; give"),
    ],
)
def test_an_unknown_user_and_an_empty_history_are_told_apart(user: int, said: str) -> None:
    with pytest.raises(DataError) as error:
        known_histories([1, user], RATED, USER_ROWS, "sample")
    assert said in str(error.value) and "user 1 " not in str(error.value)


def test_a_file_of_users_is_a_list_of_the_data_sets_users(tmp_path: Path) -> None:
    found = read(csv(tmp_path, "user_id\n1\n1\n"))
    assert found.of_data_set and list(found.labels) == [1]
    with pytest.raises(DataError, match="user 7 is not in sample"):
        read(csv(tmp_path, "user_id\n7\n"))
    with pytest.raises(DataError, match=r"row 2 of histories.csv has user_id 'anna', expected a"):
        read(csv(tmp_path, "user_id\n1\nanna\n"))


ROWS = [
    {"user_id": "anna", "title": "The Net (1995)", "rating": 4},
    {"user_id": "bert", "title": "Fargo", "rating": 1},
    {"user_id": "anna", "title": "Heat (1995)", "rating": 5},
]


def written(directory: Path, suffix: str) -> Path:
    path = directory / f"histories{suffix}"
    if suffix == ".csv":
        pd.DataFrame(ROWS).to_csv(path, index=False)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pd.DataFrame(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_anybodys_history_is_read_in_three_formats(tmp_path: Path, suffix: str) -> None:
    found = read(written(tmp_path, suffix))
    assert found.labels == {1: "anna", 2: "bert"} and not found.of_data_set
    ratings = found.ratings
    assert ratings["user_id"].tolist() == [1, 2, 1]
    assert ratings["movie_id"].tolist() == [2, 3, 1]
    # oldest first, the last when the data set ends
    assert ratings["timestamp"].tolist() == [89, 90, 90]
    assert list(ratings) == RATINGS.names and ratings["rating"].dtype == "int8"
    assert found.users["occupation"].tolist() == ["other", "other"]
    assert found.users["age"].isna().all() and list(found.users) == USERS.names


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_ids_and_times_are_taken_as_given(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"user_id": 900, "movie_id": 3, "rating": 3, "timestamp": 1_700_000_000},
        {"user_id": 900, "movie_id": 1, "rating": 3, "timestamp": 1_600_000_000},
    ]
    path = tmp_path / f"own{suffix}"
    frame = pd.DataFrame(rows)
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    found = read(path)
    assert found.labels == {1: "900"}
    assert found.ratings["timestamp"].tolist() == [1_700_000_000, 1_600_000_000]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no row"),
        ("user_id,title,rating\n", "holds no row"),
        ("name,title\nanna,Fargo (1996)\n", "has no column user_id (it has name, title)"),
        ("user_id,title\nanna,Fargo (1996)\n", "has no column rating: 1 to 5 stars"),
        ("user_id,title,rating\n,Fargo (1996),4\n", "row 1 of histories.csv names no user"),
        ("user_id,title,rating\nanna,,4\n", "row 1 of histories.csv names no film"),
        (
            "user_id,title,rating\nanna,Frago (1996),4\n",
            'has the title "Frago (1996)", which is no film of sample: did you mean '
            '"Fargo (1996)"?',
        ),
        ("user_id,title,rating\nanna,Shrek (2001),4\n", "no film of sample, as titles stand"),
        ("user_id,title,rating\nanna,Heat,4\n", 'has the title "Heat", which is no film'),
        ("user_id,movie_id,rating\nanna,99,4\n", "movie_id 99, which is no film of sample (4 fil"),
        ("user_id,movie_id,rating\nanna,1,\n", "row 1 of histories.csv has no rating, expected"),
        ("user_id,movie_id,rating\nanna,1,6\n", "rating '6', expected a whole number from 1 to 5"),
        ("user_id,movie_id,rating\nanna,1,4.5\n", "rating '4.5', expected a whole number"),
        (
            "user_id,movie_id,rating,timestamp\nanna,1,4,yesterday\n",
            "timestamp 'yesterday', expected a whole number",
        ),
        ("user_id,movie_id,rating\na,1,4\nb,1,4\na,1,5\n", "row 3 of histories.csv rates the film"),
    ],
)
def test_a_bad_row_is_named_with_its_remedy(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError) as error:
        read(csv(tmp_path, text))
    assert said in str(error.value)


def test_every_bad_row_is_told_up_to_ten(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read(csv(tmp_path, "user_id,movie_id,rating\n" + "anna,99,4\n" * 14))
    assert str(error.value).count("which is no film") == 10
    assert str(error.value).endswith("and 4 more")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"", "a.txt: a file of users ends in .csv (CSV), .jsonl (JSON lines), .parquet"),
        ("a.jsonl", b'{"user_id": 1\n', "a.jsonl cannot be read as JSON lines"),
        ("a.parquet", b"nothing", "a.parquet cannot be read as Parquet"),
        ("a.csv", b"user_id,title\n\xff\xfe,x\n", "a.csv cannot be read as CSV"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert said in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read(tmp_path / "nothing.csv")
