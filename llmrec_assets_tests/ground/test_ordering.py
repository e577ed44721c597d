"""Rating columns sorted as one number or by keys: the same order."""

from __future__ import annotations

import numpy as np
import pandas as pd
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmrec_assets.ground.ordering import by_user_and_time, occurred_before

SMALL = st.tuples(*[st.integers(-3, 3)] * 4)
#: Together wider than 63 bits.
WIDE = st.tuples(
    st.integers(1, 2**31 - 1), st.integers(1, 2**32), st.integers(1, 2**31 - 1), st.integers(1, 5)
)


#: A few bits too wide, and as many users as make the difference.
HALVED = st.tuples(
    st.integers(0, 500), st.integers(0, 2**32), st.integers(0, 2**24), st.integers(1, 5)
)


@given(st.one_of(*(st.lists(rows, max_size=20) for rows in (SMALL, WIDE, HALVED))))
@example([])
@example([(1, 1, 1, 1), (2**31 - 1, 2**32, 1, 1)])  # 63 bits, the most that fit
@settings(max_examples=60, deadline=None)
def test_rows_are_ordered_by_user_time_film_and_rating(rows: list[tuple[int, ...]]) -> None:
    columns = [np.array([row[i] for row in rows], dtype=np.int64) for i in range(4)]
    before = [column.copy() for column in columns]
    found = by_user_and_time(*columns)
    assert list(zip(*(column.tolist() for column in found), strict=True)) == sorted(rows)
    assert all(np.array_equal(a, b) for a, b in zip(columns, before, strict=True))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=20))
@example([(2**31 - 1, 2**31 - 1), (2**31 - 1, 0), (2**31 - 1, 2**31 - 1)])
@settings(max_examples=60, deadline=None)
def test_pairs_that_occurred_before(pairs: list[tuple[int, int]]) -> None:
    user, movie = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    expected = pd.DataFrame({"user": user, "movie": movie}).duplicated().tolist()
    assert occurred_before(user, movie).tolist() == expected
    assert occurred_before(user.astype(np.int32), movie.astype(np.int32)).tolist() == expected
