"""Ratings in the one order that everything is read in: by user, then time, then film.

What belongs here: sorting rating columns, and finding pairs that occur twice by sorting them.
What does not: what the columns mean (``movielens``, ``windows``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_MOST_HALVINGS = 6


def by_user_and_time(
    user: Ints, timestamp: Ints, movie: Ints, rating: Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """The four columns ordered by (user, timestamp, movie, rating).

    A row whose numbers fit into 63 bits together is sorted as one number, which NumPy does with the
    processor's vector instructions, some ten times faster than by four keys. Where a few bits too
    many are the users', lower and higher users are sorted apart; where nothing fits, rows are
    sorted by the keys. The result is the same.

    Args:
        user, timestamp, movie, rating: integers of one length, in any order.

    Returns:
        user, timestamp, movie, rating as int64; the very arrays given where they are in order.
    """
    columns = [np.asarray(column, dtype=np.int64) for column in (user, timestamp, movie, rating)]
    if not len(columns[0]):
        return columns[0], columns[1], columns[2], columns[3]
    lows = [int(column.min()) for column in columns]
    widths = [
        (int(column.max()) - low).bit_length() for column, low in zip(columns, lows, strict=True)
    ]
    too_many = sum(widths) - 63
    if 0 < too_many <= min(_MOST_HALVINGS, widths[0]):
        higher = columns[0] > lows[0] + (1 << widths[0] - 1) - 1
        halves = [
            by_user_and_time(*(column[part] for column in columns)) for part in (~higher, higher)
        ]
        user, timestamp, movie, rating = map(np.concatenate, zip(*halves, strict=True))
        return user, timestamp, movie, rating
    if too_many > 0:
        order = np.lexsort(columns[::-1])
        user, timestamp, movie, rating = (column[order] for column in columns)
        return user, timestamp, movie, rating
    key = columns[0] - lows[0]
    for column, low, width in zip(columns[1:], lows[1:], widths[1:], strict=True):
        key <<= width
        key |= column - low
    if (key[1:] >= key[:-1]).all():
        user, timestamp, movie, rating = columns
        return user, timestamp, movie, rating
    key.sort()
    found = []
    for low, width in zip(lows[::-1], widths[::-1], strict=True):
        found.append((key & ((1 << width) - 1)) + low)
        key >>= width
    rating, movie, timestamp, user = found
    return user, timestamp, movie, rating


def occurred_before(user: Ints, movie: Ints) -> NDArray[np.bool_]:
    """Which (user, movie) pairs stand at an earlier place, too.

    The pairs are sorted as one number each, several times as fast as hashing them; only those that
    occur twice, few or none, are looked up.

    Args:
        user, movie: integers from 0 to 2^31 - 1, of one length.
    """
    pair = (np.asarray(user, dtype=np.int64) << 32) | np.asarray(movie, dtype=np.int64)
    ordered = np.sort(pair)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    again = np.zeros(len(pair), dtype=np.bool_)
    if len(twice):
        places = np.flatnonzero(np.isin(pair, twice))
        _, first = np.unique(pair[places], return_index=True)
        again[places] = True
        again[places[first]] = False
    return again
