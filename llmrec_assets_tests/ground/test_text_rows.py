"""Columns of whole numbers: the fast reader gives what the careful one gives, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmrec_assets.ground import text_rows
from llmrec_assets.ground.errors import DataError

FIELDS = ("user", "item", "rating")
number = st.integers(0, 10**18 - 1).map(str)
separator = st.sampled_from(["::", ":", ":::", "::::", "\t", ",", ""])
odd = st.sampled_from(["", "-1", " 1", "1.0", "x", "+1", "9" * 18, "9" * 19, "\xe9"])
line = st.lists(st.one_of(number, number, separator, separator, odd), max_size=7).map("".join)
good = st.tuples(number, number, number).map("::".join)


@pytest.mark.parametrize("between", ["::", "\t"])
@given(lines=st.lists(st.one_of(good, good, line), min_size=1, max_size=5))
@example(lines=["1::2::3"])
@example(lines=["1:2:3", "1::2::3"])
@example(lines=["1:2:3::4:5"])
@example(lines=["1::::2"])
@example(lines=["::1::2::3"])
@example(lines=["1::2::3", "", "1::2::3"])
@settings(max_examples=300, deadline=None)
def test_quick_and_careful_reading_agree(between: str, lines: list[str]) -> None:
    data = "\n".join(lines).replace("::", between).encode("latin-1").rstrip(b"\n")  # as read_text
    quick = text_rows._quickly(data, between, FIELDS)
    try:
        careful = text_rows._carefully(data, between, FIELDS, "ratings", "r.dat", 1, "")
    except DataError:
        assert quick is None
        return
    if quick is not None:
        assert all(np.array_equal(a, b) for a, b in zip(quick, careful, strict=True))
        assert all(column.dtype == np.int64 for column in quick)


@pytest.mark.parametrize("between", ["::", "\t"])
def test_plain_numbers_are_read_quickly(between: str) -> None:
    data = "\n".join([between.join("123")] * 3).encode()
    quick = text_rows._quickly(data, between, FIELDS)
    assert quick is not None
    assert [column.tolist() for column in quick] == [[1] * 3, [2] * 3, [3] * 3]
