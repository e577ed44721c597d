"""Conforming to a declared schema, and versions that follow content and nothing else."""

from __future__ import annotations

import datetime
import hashlib
import io
import math
import struct

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.ground.tables import conform, content_version, require, to_frame

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int32(), nullable=False),
        pa.field("year", pa.int16(), nullable=True),
        pa.field("title", pa.string(), nullable=True),
        pa.field("score", pa.float64(), nullable=True),
        pa.field("released", pa.date32(), nullable=True),
        pa.field("films", pa.list_(pa.int32()), nullable=True),
        pa.field("genres", pa.list_(pa.string()), nullable=True),
        pa.field("seen", pa.bool_(), nullable=False),
    ]
)


def frame(**columns: object) -> pd.DataFrame:
    values: dict[str, object] = {
        "id": [1, 2],
        "year": pd.array([1995, None], dtype="Int16"),
        "title": ["Cité des enfants perdus, La 🎬", None],
        "score": [0.5, None],
        "released": [datetime.date(1995, 5, 17), None],
        "films": [[1, 2], None],
        "genres": [["Drama", "Sci-Fi"], []],
        "seen": [True, False],
    }
    return pd.DataFrame({**values, **columns})


def one_column(values: list, type_: pa.DataType) -> pa.Table:
    return pa.table({"c": pa.array(values, type=type_)})


def version(values: list, type_: pa.DataType) -> str:
    return content_version(one_column(values, type_))


# -- conform ------------------------------------------------------------------------------


def test_conform_keeps_every_value():
    assert conform(frame(), SCHEMA, "t").to_pylist() == [
        {
            "id": 1,
            "year": 1995,
            "title": "Cité des enfants perdus, La 🎬",
            "score": 0.5,
            "released": datetime.date(1995, 5, 17),
            "films": [1, 2],
            "genres": ["Drama", "Sci-Fi"],
            "seen": True,
        },
        {
            "id": 2,
            "year": None,
            "title": None,
            "score": None,
            "released": None,
            "films": None,
            "genres": [],
            "seen": False,
        },
    ]


def test_columns_are_matched_by_name_not_by_position():
    shuffled = frame()[list(reversed(SCHEMA.names))]
    table = conform(shuffled, SCHEMA, "t")
    assert table.schema.equals(SCHEMA)
    assert table.equals(conform(frame(), SCHEMA, "t"))


def test_the_index_plays_no_role():
    assert conform(frame().set_axis([7, 7]), SCHEMA, "t").equals(conform(frame(), SCHEMA, "t"))


def test_missing_extra_and_double_columns_are_all_named():
    wrong = frame().drop(columns=["year", "films"]).assign(rank=1, stage="sft")
    wrong = pd.concat([wrong, wrong[["title"]]], axis=1)
    with pytest.raises(StoreError) as error:
        conform(wrong, SCHEMA, "prompts")
    message = str(error.value)
    assert message.startswith("prompts: ")
    assert "missing: year, films" in message
    assert "not declared: rank, stage" in message
    assert "there twice: title" in message


@pytest.mark.parametrize(
    ("column", "values"),
    [("id", [1, None]), ("id", [1, math.nan]), ("id", pd.array([1, None], dtype="Int64"))],
)
def test_null_where_none_may_be_names_column_and_row(column, values):
    with pytest.raises(StoreError, match=rf"ratings\.{column}: row 1 is NULL"):
        conform(frame(**{column: values}), SCHEMA, "ratings")


def test_the_first_null_row_is_named():
    schema = pa.schema([pa.field("s", pa.string(), nullable=False)])
    with pytest.raises(StoreError, match=r"t\.s: row 2 is NULL"):
        conform(pd.DataFrame({"s": ["a", "", None, None]}), schema, "t")


@pytest.mark.parametrize(
    ("column", "values", "declared"),
    [
        ("id", [1, 2**31], "int32"),
        ("id", [-(2**31) - 1, 1], "int32"),
        ("id", [1, 2**70], "int32"),
        ("year", [1995, 2**15], "int16"),
        ("id", [1.5, 2.0], "int32"),
        ("id", ["1", "2"], "int32"),
        ("id", pd.to_datetime(["1995-01-01", "1996-01-01"]), "int32"),
        ("title", [1, 2], "string"),
        ("title", pd.Series(["\ud800", "a"], dtype=object), "string"),
        ("films", [1, 2], "list<item: int32>"),
        ("films", [[2**31], []], "list<item: int32>"),
        ("genres", [[1], []], "list<item: string>"),
        ("released", ["May 1995", None], r"date32\[day\]"),
    ],
)
def test_values_of_another_kind_or_range_name_column_and_type(column, values, declared):
    with pytest.raises(StoreError, match=rf"(?s)movies\.{column}: .*\(declared {declared}\)"):
        conform(frame(**{column: values}), SCHEMA, "movies")


def test_the_ends_of_a_range_fit():
    table = conform(frame(id=[-(2**31), 2**31 - 1], year=[-(2**15), 2**15 - 1]), SCHEMA, "t")
    assert table["id"].to_pylist() == [-(2**31), 2**31 - 1]
    assert table["year"].to_pylist() == [-(2**15), 2**15 - 1]


@pytest.mark.parametrize("asset", SCHEMAS)
@pytest.mark.parametrize("dtype", [object, "str"])
def test_an_empty_frame_is_a_table_with_zero_rows(asset, dtype):
    schema = SCHEMAS[asset]
    table = conform(pd.DataFrame(columns=schema.names, dtype=dtype), schema, asset)
    assert table.num_rows == 0
    assert table.schema.equals(schema)


def test_arrays_and_tuples_are_lists():
    table = conform(frame(films=[np.array([3, 4]), (5,)]), SCHEMA, "t")
    assert table["films"].to_pylist() == [[3, 4], [5]]


def test_timestamps_become_dates():
    released = pd.Series(pd.to_datetime(["1995-05-17", None]))
    assert conform(frame(released=released), SCHEMA, "t")["released"].to_pylist() == [
        datetime.date(1995, 5, 17),
        None,
    ]


def test_require_refuses_other_schemas_and_nulls():
    table = conform(frame(), SCHEMA, "t")
    require(table, SCHEMA, "t")
    with pytest.raises(StoreError, match=r"users: .*id int32"):
        require(table.set_column(0, "id", pa.array([1, 2], pa.int64())), SCHEMA, "users")
    with pytest.raises(StoreError, match=r"users: .*declared schema"):
        require(table.select(list(reversed(SCHEMA.names))), SCHEMA, "users")
    holed = pa.table([pa.array([1, None], pa.int32()), *table.columns[1:]], schema=SCHEMA)
    with pytest.raises(StoreError, match=r"users\.id: row 1 is NULL"):
        require(holed, SCHEMA, "users")


# -- content_version ----------------------------------------------------------------------


def test_version_is_the_hash_of_names_types_and_values():
    """Computed by hand: no Arrow or Parquet release may change a version."""
    table = pa.table(
        {
            "n": pa.array([7, None, -1], pa.int16()),
            "s": pa.array(["é", "", None], pa.string()),
            "l": pa.array([[1], None, [2, None]], pa.list_(pa.int32())),
        }
    )

    def head(count: int, valid: int) -> bytes:
        return struct.pack("<q", count) + bytes([valid])

    expected = hashlib.sha256(
        b"n:int16;" + head(3, 0b10100000) + struct.pack("<3h", 7, 0, -1)
        # lengths are in bytes of UTF-8
        + b"s:string;" + head(3, 0b11000000) + struct.pack("<3q", 2, 0, 0) + "é".encode()
        + b"l:list<item: int32>;" + head(3, 0b10100000) + struct.pack("<3q", 1, 0, 2)
        + head(3, 0b11000000) + struct.pack("<3i", 1, 2, 0)
    )  # fmt: skip
    assert content_version(table) == expected.hexdigest()[:16]


@pytest.mark.parametrize(
    ("left", "right", "type_"),
    [
        ([0], [None], pa.int32()),
        ([0], [1], pa.int8()),
        ([1, 2], [2, 1], pa.int32()),
        ([0], [0, 0], pa.int32()),
        ([], [None], pa.int32()),
        ([False], [None], pa.bool_()),
        ([False], [True], pa.bool_()),
        ([0.0], [None], pa.float64()),
        ([0.1], [math.nextafter(0.1, 1)], pa.float64()),
        ([""], [None], pa.string()),
        (["ab", "c"], ["a", "bc"], pa.string()),
        (["a"], ["A"], pa.string()),
        (["é"], ["e\u0301"], pa.string()),
        ([datetime.date(1970, 1, 1)], [None], pa.date32()),
        ([datetime.date(1970, 1, 1)], [datetime.date(1970, 1, 2)], pa.date32()),
        ([None], [[]], pa.list_(pa.int32())),
        ([[]], [[None]], pa.list_(pa.int32())),
        ([[None]], [[0]], pa.list_(pa.int32())),
        ([[1], [2, 3]], [[1, 2], [3]], pa.list_(pa.int32())),
        ([[1, 2], []], [[], [1, 2]], pa.list_(pa.int32())),
        ([["ab", "c"]], [["a", "bc"]], pa.list_(pa.string())),
        ([["a"], None], [None, ["a"]], pa.list_(pa.string())),
    ],
)
def test_another_value_is_another_version(left, right, type_):
    assert version(left, type_) != version(right, type_)


def test_name_and_type_count():
    table = one_column([1], pa.int32())
    assert content_version(table) != content_version(table.rename_columns(["d"]))
    assert content_version(table) != version([1], pa.int64())
    assert version([], pa.int32()) != version([], pa.string())
    assert version([None], pa.list_(pa.int32())) != version([None], pa.list_(pa.string()))


def test_a_validity_bitmap_without_a_null_changes_nothing():
    data = pa.array([1, 2, 3], pa.int32()).buffers()[1]
    bare = pa.Array.from_buffers(pa.int32(), 3, [None, data])
    mapped = pa.Array.from_buffers(pa.int32(), 3, [pa.py_buffer(b"\xff"), data])
    assert bare.buffers()[0] is None
    assert mapped.buffers()[0] is not None
    assert content_version(pa.table({"c": bare})) == content_version(pa.table({"c": mapped}))


def test_what_stands_under_a_null_changes_nothing():
    bitmap = pa.py_buffer(bytes([0b101]))
    versions = set()
    for hidden in (0, 99):
        data = pa.array([1, hidden, 3], pa.int32()).buffers()[1]
        array = pa.Array.from_buffers(pa.int32(), 3, [bitmap, data])
        assert array.to_pylist() == [1, None, 3]
        versions.add(content_version(pa.table({"c": array})))
    offsets = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]
    hiding = pa.ListArray.from_buffers(
        pa.list_(pa.int32()), 3, [bitmap, offsets], children=[pa.array([1, 2, 3], pa.int32())]
    )
    assert hiding.to_pylist() == [[1], None, [3]]
    assert content_version(pa.table({"c": hiding})) == version(
        [[1], None, [3]], pa.list_(pa.int32())
    )
    assert len(versions) == 1


def test_wider_integers_of_a_frame_give_the_declared_version():
    narrow = frame(id=np.array([1, 2], np.int32))
    wide = frame(id=np.array([1, 2], np.int64), year=pd.array([1995, None], dtype="Int64"))
    floats = frame(year=[1995.0, math.nan])
    versions = {content_version(conform(f, SCHEMA, "t")) for f in (frame(), narrow, wide, floats)}
    assert len(versions) == 1


def test_parquet_and_back_is_the_same_version():
    table = conform(frame(), SCHEMA, "t")
    file = io.BytesIO()
    pq.write_table(table, file)
    file.seek(0)
    assert content_version(pq.read_table(file)) == content_version(table)


ROWS = st.lists(
    st.tuples(
        st.sampled_from([None, 0, 1]),
        st.sampled_from([None, "", "a", "ab", "b", "é"]),
        st.sampled_from([None, [], [0], [None], [0, 1]]),
        st.sampled_from([None, [], [""], ["a"], ["ab"], ["a", "b"], [None]]),
        st.sampled_from([None, 0.0, 1.0]),
    ),
    max_size=4,
)
DRAWN = pa.schema(
    [
        ("n", pa.int16()),
        ("s", pa.string()),
        ("l", pa.list_(pa.int32())),
        ("ls", pa.list_(pa.string())),
        ("f", pa.float64()),
    ]
)


def drawn_table(rows: list[tuple]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(DRAWN)
    return pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, DRAWN, strict=True)], schema=DRAWN
    )


@st.composite
def near_pairs(draw: st.DrawFn) -> tuple[list[tuple], list[tuple]]:
    """Two lists of rows that are equal, differ in one cell, or are unrelated."""
    left = draw(ROWS)
    right = [list(row) for row in left]
    change = draw(st.sampled_from(["none", "cell", "other"]))
    if change == "other":
        return left, draw(ROWS)
    if change == "cell" and right:
        row = draw(st.integers(0, len(right) - 1))
        column = draw(st.integers(0, len(DRAWN) - 1))
        right[row][column] = draw(ROWS.filter(bool))[0][column]
    return left, [tuple(row) for row in right]


@given(near_pairs())
@settings(max_examples=200, deadline=None)
def test_versions_are_equal_exactly_when_content_is(pair):
    left, right = pair
    same = content_version(drawn_table(left)) == content_version(drawn_table(right))
    assert same == (left == right)


@given(ROWS, ROWS, st.data())
@settings(max_examples=80, deadline=None)
def test_chunks_and_slices_change_nothing(rows, before, data):
    table = drawn_table(rows)
    expected = content_version(table)
    cut = data.draw(st.integers(0, len(rows)))
    chunked = pa.concat_tables([table.slice(0, cut), table.slice(cut), table.slice(0, 0)])
    assert content_version(chunked) == expected
    inside = pa.concat_tables([drawn_table(before), table, drawn_table(before)]).combine_chunks()
    assert content_version(inside.slice(len(before), len(rows))) == expected
    assert content_version(pa.Table.from_batches([], DRAWN)) == content_version(drawn_table([]))


# -- to_frame -----------------------------------------------------------------------------


def test_round_trip_keeps_types_and_nulls():
    table = conform(frame(), SCHEMA, "t")
    back = to_frame(table)
    assert list(back.columns) == SCHEMA.names
    assert back["id"].dtype == np.dtype("int32")
    assert back["year"].dtype == pd.Int16Dtype()
    assert back["year"].tolist() == [1995, pd.NA]
    assert back["seen"].dtype == np.dtype(bool)
    assert back["score"].dtype == np.dtype("float64")
    assert back["title"][0] == "Cité des enfants perdus, La 🎬"
    assert pd.isna(back["title"][1])
    assert back["released"].tolist() == [datetime.date(1995, 5, 17), None]
    assert back["films"].tolist() == [[1, 2], None]
    assert back["genres"].tolist() == [["Drama", "Sci-Fi"], []]
    assert type(back["films"][0]) is list
    assert conform(back, SCHEMA, "t").equals(table)


def test_a_nullable_integer_column_has_one_type_with_and_without_nulls():
    whole = conform(frame(year=[1, 2]), SCHEMA, "t")
    assert to_frame(whole)["year"].dtype == pd.Int16Dtype()
    assert to_frame(whole.slice(0, 0))["year"].dtype == pd.Int16Dtype()


@pytest.mark.parametrize("asset", SCHEMAS)
def test_empty_tables_round_trip(asset):
    schema = SCHEMAS[asset]
    table = conform(pd.DataFrame(columns=schema.names), schema, asset)
    assert conform(to_frame(table), schema, asset).equals(table)


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_round_trip_of_any_rows(rows):
    table = drawn_table(rows)
    assert conform(to_frame(table), DRAWN, "t").equals(table)
