"""The SQL door: views over current tables, and an open client that stops nobody."""

from __future__ import annotations

import contextlib
import csv
import io
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd
import pytest

from llmrec_assets.ground import warehouse
from llmrec_assets.ground.store import Store
from llmrec_assets.ground.warehouse import WAREHOUSE, connect, publish_warehouse

CLI = Path(sys.executable).parent / "duckdb"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path / "home")


def splits(*user_ids: int) -> pd.DataFrame:
    return pd.DataFrame({"user_id": list(user_ids), "split": ["test"] * len(user_ids)})


def movies(*titles: str) -> pd.DataFrame:
    ids = list(range(1, len(titles) + 1))
    return pd.DataFrame(
        {
            "movie_id": ids,
            "title": list(titles),
            "year": pd.array([None] * len(ids), dtype="Int16"),
            "release_date": None,
            "genres": [["Drama", "War"]] * len(ids),
            "canonical_movie_id": ids,
        }
    )


def file_query(store: Store, sql: str) -> list[tuple]:
    with duckdb.connect(str(store.root / WAREHOUSE), read_only=True) as connection:
        return connection.sql(sql).fetchall()


def memory_query(store: Store, sql: str) -> list[tuple]:
    with connect(store) as connection:
        return connection.sql(sql).fetchall()


def listing(store: Store) -> list[str]:
    return sorted(
        path.name for path in Path(str(store.root)).iterdir() if not path.name.endswith(".lock")
    )


@contextlib.contextmanager
def writing_client(store: Store, *, checkpointed: bool = False) -> Iterator:
    """Another process holds the file read-write; yields a function that lets it write a row."""
    script = """
    import sys, duckdb
    connection = duckdb.connect(sys.argv[1])
    connection.execute("SET wal_autocheckpoint = '1GB'")
    connection.execute("CREATE TABLE mine AS SELECT 1 AS x")
    if sys.argv[2] == "True":
        connection.execute("CHECKPOINT")
    print(connection.sql("SELECT count(*) FROM user_splits").fetchall()[0][0], flush=True)
    for _ in sys.stdin:
        connection.execute("INSERT INTO mine VALUES (2)")
        print(connection.sql("SELECT count(*) FROM mine").fetchall()[0][0], flush=True)
    """
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(script),
            str(store.root / WAREHOUSE),
            str(checkpointed),
        ],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    seen = int(process.stdout.readline())

    def write() -> int:
        process.stdin.write("\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    try:
        yield write, seen
    finally:
        process.kill()  # no chance to check-point: its log stays where it is
        process.communicate()


# -- views --------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [file_query, memory_query])
def test_a_view_per_table_with_dataset_and_recipe_over_all_partitions(store, query):
    store.publish_table("user_splits", "sample|tiny", splits(1, 2))
    store.publish_table("user_splits", "ml-100k|paper", splits(3))
    store.publish_table("movies", "sample", movies("Net, The (1995)", "Schindler's List (1993)"))
    publish_warehouse(store)
    assert query(store, "FROM user_splits ORDER BY user_id") == [
        ("sample", "tiny", 1, "test"),
        ("sample", "tiny", 2, "test"),
        ("ml-100k", "paper", 3, "test"),
    ]
    assert query(store, "SELECT dataset, title, genres[2] FROM movies ORDER BY title") == [
        ("sample", "Net, The (1995)", "War"),
        ("sample", "Schindler's List (1993)", "War"),
    ]
    columns = "SELECT column_name FROM (DESCRIBE {})"
    assert query(store, columns.format("user_splits")) == [
        ("dataset",),
        ("recipe",),
        ("user_id",),
        ("split",),
    ]
    assert query(store, columns.format("movies"))[:2] == [("dataset",), ("movie_id",)]
    assert query(store, "SELECT view_name FROM duckdb_views() WHERE NOT internal ORDER BY 1") == [
        ("movies",),
        ("user_splits",),
    ]


@pytest.mark.parametrize("query", [file_query, memory_query])
def test_views_read_the_current_version_only(store, query):
    store.publish_table("user_splits", "sample|tiny", splits(1, 2))
    store.publish_table("user_splits", "sample|tiny", splits(3))
    publish_warehouse(store)
    assert query(store, "SELECT user_id FROM user_splits") == [(3,)]


@pytest.mark.parametrize("query", [file_query, memory_query])
def test_equal_rows_stay_two_rows(store, query):
    store.publish_table("user_splits", "sample|tiny", splits(1, 1))
    store.publish_table("user_splits", "sample|paper", splits(1))
    publish_warehouse(store)
    assert query(store, "SELECT count(*) FROM user_splits") == [(3,)]


@pytest.mark.parametrize("query", [file_query, memory_query])
def test_an_empty_table_is_a_view_without_rows(store, query):
    store.publish_table("user_splits", "sample|tiny", splits())
    publish_warehouse(store)
    assert query(store, "FROM user_splits") == []
    store.publish_table("user_splits", "sample|paper", splits(1))
    publish_warehouse(store)
    assert query(store, "FROM user_splits") == [("sample", "paper", 1, "test")]


def test_an_empty_store_is_an_empty_warehouse(store):
    Path(str(store.root)).mkdir()
    path = publish_warehouse(store)
    assert path == Path(str(store.root)) / WAREHOUSE
    assert file_query(store, "SHOW TABLES") == []


@pytest.mark.parametrize(
    "home",
    [
        "O'Neill's house",
        'the "big" one',
        "filmé ; DROP",
        "{runs}",
        "dataset=foo/recipe=tiny",
        "tables",
    ],
)
def test_a_home_may_have_any_name(tmp_path, home, monkeypatch):
    store = Store.at(tmp_path / home)
    store.publish_table("user_splits", "sample|tiny", splits(1))
    publish_warehouse(store)
    monkeypatch.chdir("/")  # reads are absolute
    expected = [("sample", "tiny", 1, "test")]
    assert file_query(store, "FROM user_splits") == expected
    assert memory_query(store, "FROM user_splits") == expected


@pytest.mark.parametrize(("home", "other"), [("run*", "runs"), ("run[s]", "runs")])
def test_a_home_is_no_pattern_that_also_matches_its_neighbour(tmp_path, home, other):
    for name in (home, other):
        Store.at(tmp_path / name).publish_table("user_splits", "sample|tiny", splits(1))
    store = Store.at(tmp_path / home)
    publish_warehouse(store)
    assert file_query(store, "SELECT count(*) FROM user_splits") == [(1,)]
    assert memory_query(store, "SELECT count(*) FROM user_splits") == [(1,)]


# -- publishing ---------------------------------------------------------------------------


def test_nothing_but_the_file_is_left_in_the_home(store):
    store.publish_table("user_splits", "sample|tiny", splits(1))
    for _ in range(2):
        publish_warehouse(store)
        assert listing(store) == ["tables", WAREHOUSE]


@pytest.mark.parametrize("place", ["replace", "build"])
def test_a_crash_leaves_the_previous_warehouse(store, monkeypatch, place):
    store.publish_table("user_splits", "sample|tiny", splits(1))
    publish_warehouse(store)
    store.publish_table("user_splits", "sample|tiny", splits(2))

    def crash(*_):
        raise OSError("killed")

    if place == "replace":
        monkeypatch.setattr(warehouse.os, "replace", crash)
    else:
        statements = ['CREATE VIEW "a" AS SELECT 1', "CREATE VIEW broken AS SELECT FROM WHERE"]
        monkeypatch.setattr(warehouse, "view_statements", lambda _: statements)
    with pytest.raises((OSError, duckdb.Error)):
        publish_warehouse(store)
    monkeypatch.undo()
    assert listing(store) == ["tables", WAREHOUSE]
    assert file_query(store, "SELECT user_id FROM user_splits") == [(1,)]
    publish_warehouse(store)
    assert file_query(store, "SELECT user_id FROM user_splits") == [(2,)]


def test_a_writing_client_blocks_no_publish_and_keeps_the_old_views(store):
    store.publish_table("user_splits", "sample|tiny", splits(1))
    publish_warehouse(store)
    with writing_client(store) as (write, seen):
        assert seen == 1
        # It does hold the file: nobody else may open it now, and its log is there.
        assert WAREHOUSE + ".wal" in listing(store)
        with pytest.raises(duckdb.IOException, match="lock"):
            file_query(store, "FROM user_splits")
        assert memory_query(store, "SELECT count(*) FROM user_splits") == [(1,)]

        store.publish_table("user_splits", "sample|tiny", splits(1, 2))
        publish_warehouse(store)
        assert listing(store) == ["tables", WAREHOUSE]
        assert file_query(store, "SELECT count(*) FROM user_splits") == [(2,)]
        assert write() == 2  # the client works on, in the file it opened
        assert memory_query(store, "SELECT count(*) FROM user_splits") == [(2,)]
    assert file_query(store, "SHOW TABLES") == [("user_splits",)]


def test_the_log_of_a_killed_client_is_not_replayed_into_the_new_file(store):
    store.publish_table("user_splits", "sample|tiny", splits(1))
    publish_warehouse(store)
    with writing_client(store):
        pass
    assert WAREHOUSE + ".wal" in listing(store)
    publish_warehouse(store)
    with duckdb.connect(str(store.root / WAREHOUSE)) as connection:
        assert connection.sql("SHOW TABLES").fetchall() == [("user_splits",)]


def test_a_log_written_after_the_publish_is_gone_with_the_next(store):
    """A client that opened the old file makes its next log beside the new one. DuckDB sees that
    the two do not belong together; in-memory queries never see either."""
    store.publish_table("user_splits", "sample|tiny", splits(1))
    publish_warehouse(store)
    with writing_client(store, checkpointed=True) as (write, _):
        assert WAREHOUSE + ".wal" not in listing(store)
        publish_warehouse(store)
        write()
    assert WAREHOUSE + ".wal" in listing(store)
    with pytest.raises(duckdb.Error, match="WAL"):
        file_query(store, "SHOW TABLES")
    assert memory_query(store, "SELECT count(*) FROM user_splits") == [(1,)]
    publish_warehouse(store)
    assert file_query(store, "SHOW TABLES") == [("user_splits",)]


# -- the released command line ------------------------------------------------------------


@pytest.mark.skipif(not CLI.exists(), reason=f"no {CLI}: install the dev extra (duckdb-cli)")
def test_the_released_command_line_reads_it_from_anywhere(tmp_path):
    store = Store.at(tmp_path / "O'Neill's house")
    store.publish_table("movies", "sample", movies("Net, The (1995)", 'A "quoted", one (1990)'))
    store.publish_table("user_splits", "sample|tiny", splits(1, 2))
    store.publish_table("user_splits", "ml-1m|cpu", splits())
    path = publish_warehouse(store)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def ask(sql: str) -> list[list[str]]:
        done = subprocess.run(
            [CLI, "-readonly", "-csv", path, "-c", sql],
            cwd=elsewhere,
            text=True,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return list(csv.reader(io.StringIO(done.stdout)))

    assert ask("SELECT dataset, recipe, count(*) AS n FROM user_splits GROUP BY ALL") == [
        ["dataset", "recipe", "n"],
        ["sample", "tiny", "2"],
    ]
    assert ask("SELECT dataset, title FROM movies ORDER BY movie_id") == [
        ["dataset", "title"],
        ["sample", "Net, The (1995)"],
        ["sample", 'A "quoted", one (1990)'],
    ]
    assert list(elsewhere.iterdir()) == []
