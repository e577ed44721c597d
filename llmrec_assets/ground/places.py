"""Where a ZIP code lies: city and state, from the data base that ``pyzipcode`` ships.

What belongs here: the lookup, and what counts as a United States ZIP code. What does not: reading
users (``movielens``). Nothing is guessed: a code the data base does not know has no place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pyzipcode import ConnectionManager

#: Five digits, or ZIP+4 with or without its hyphen. Shorter codes are not padded with zeros: four
#: digits are as likely Swiss or Australian as a spreadsheet's 02139; letters are Canadian, British.
_US_ZIP = re.compile(r"([0-9]{5})(?:-?[0-9]{4})?")

#: SQLite builds before 3.32 allow 999 parameters a query.
_CODES_PER_QUERY = 900


def city_state(zip_codes: Iterable[str]) -> dict[str, tuple[str, str] | None]:
    """Maps every ZIP code, as written, to its (city, two-letter state).

    A ZIP+4 code is looked up by its first five digits. Foreign, malformed and unknown codes map
    to None.

    >>> city_state(["02139", "02139-4307", "V5K0A1"])
    {'02139': ('Cambridge', 'MA'), '02139-4307': ('Cambridge', 'MA'), 'V5K0A1': None}
    """
    five_digits = {
        code: match.group(1) if (match := _US_ZIP.fullmatch(code.strip())) else None
        for code in zip_codes
    }
    wanted = sorted({five for five in five_digits.values() if five is not None})
    # ``ZipCodeDatabase.get`` opens the data base once per code (a second for ML-1M's users); the
    # package's own connection manager asks for many at once.
    data_base = ConnectionManager()
    places: dict[str, tuple[str, str]] = {}
    for start in range(0, len(wanted), _CODES_PER_QUERY):
        some = wanted[start : start + _CODES_PER_QUERY]
        marks = ",".join("?" * len(some))
        rows = data_base.query(
            f"SELECT zip, city, state FROM ZipCodes WHERE zip IN ({marks})", some
        )
        places.update((five, (city, state)) for five, city, state in rows)
    return {code: None if five is None else places.get(five) for code, five in five_digits.items()}
