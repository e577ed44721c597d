"""Rows of delimited latin-1 text: bytes to fields, and exactly which row is wrong.

What belongs here: encodings, line ends, field counts, whole numbers. What does not: what a field
means (``movielens``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from llmrec_assets.ground.errors import DataError

RESTORE = "Correct the row, or restore the file from the original archive."

#: Bytes that Arrow parses at once: a million ratings take 0.055 s with four times the default, and
#: 0.066 s with the default.
_BLOCK = 1 << 22

_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")  # at most 18 digits: fits int64


def bad_row(table: str, file: str, row: int, what: str, remedy: str = RESTORE) -> DataError:
    """The error to raise for a 1-based row: what is wrong with it, and the way out."""
    return DataError(f"{table}: row {row:,} of {file} {what}. {remedy}")


def whole_number(
    table: str, file: str, row: int, field: str, text: str, remedy: str = RESTORE
) -> int:
    """The field's value; raises DataError naming row and field when it is anything else."""
    text = text.strip()
    if not _WHOLE_NUMBER.fullmatch(text):
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise bad_row(table, file, row, f"has {field} {shown!r}, expected a whole number", remedy)
    return int(text)


def rows(
    path: Path, table: str, separator: str, width: int, fields: str
) -> Iterator[tuple[int, list[str]]]:
    """Yields (1-based row, fields) and refuses rows of another width."""
    # Not ``splitlines``: latin-1 text may hold characters that it takes for line ends.
    for row, line in enumerate(read_text(path, table).decode("latin-1").split("\n"), start=1):
        values = line.split(separator)
        if len(values) != width:
            raise _wrong_width(table, path.name, row, line, len(values), width, fields)
        yield row, values


def _wrong_width(
    table: str,
    file: str,
    row: int,
    line: str,
    found: int,
    expected: int,
    fields: str,
    remedy: str = RESTORE,
) -> DataError:
    has = "is blank" if not line.strip() else f"has {found} field{'s' * (found != 1)}"
    return bad_row(table, file, row, f"{has}, expected {expected} ({fields})", remedy)


def read_text(path: Path, table: str) -> bytes:
    """The file's bytes as latin-1 text with plain line ends and no blank lines at the end."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{table}: file {path.name} is missing in {path.parent}. Put it there, or set "
            "LLMREC_DATA_DIR to a directory or zip that holds the whole data set."
        ) from None
    except OSError as error:
        raise DataError(
            f"{table}: file {path} cannot be read ({error.strerror}). Make it a readable file."
        ) from error
    _refuse_other_encodings(data, path.name, table)
    if b"\r" in data:  # one byte is found in a tenth of the time that two take
        data = data.replace(b"\r\n", b"\n")
    data = data.rstrip(b"\r\n")
    if not data.strip():
        raise DataError(
            f"{table}: file {path.name} is empty (no row 1). Restore it from the original archive."
        )
    return data


def _refuse_other_encodings(data: bytes, file: str, table: str) -> None:
    """Both formats are latin-1, which decodes anything: other encodings must be recognised."""

    def refuse(position: int, encoding: str, command: str) -> DataError:
        row = data.count(b"\n", 0, position) + 1
        what = f"shows that the file is {encoding}, expected latin-1"
        remedy = f"Convert it: {command} > {file}.latin1, then put that in its place."
        return bad_row(table, file, row, what, remedy)

    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise refuse(0, "UTF-16", f"iconv -f utf-16 -t latin1 {file}")
    if data.startswith(b"\xef\xbb\xbf"):
        command = f"tail -c +4 {file} | iconv -f utf-8 -t latin1"  # latin-1 has no byte-order mark
        raise refuse(0, "UTF-8 with a byte-order mark", command)
    if (position := data.find(b"\0")) >= 0:
        command = f"iconv -f utf-16 -t latin1 {file}"
        raise refuse(position, "UTF-16 or binary (it holds NUL bytes)", command)
    if data.isascii():
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return
    first = next(match.start() for match in re.finditer(r"[^\x00-\x7f]", text))
    raise refuse(first, "UTF-8", f"iconv -f utf-8 -t latin1 {file}")


def number_columns(
    path: Path, table: str, separator: str, fields: Sequence[str]
) -> list[np.ndarray]:
    """Reads a file of whole numbers as one int64 array per field; element i is row i + 1.

    Raises:
        DataError: names the first row that is anything else.
    """
    return numbers_in(read_text(path, table), path.name, table, separator, fields)


def numbers_in(
    data: bytes,
    file: str,
    table: str,
    separator: str,
    fields: Sequence[str],
    *,
    first_row: int = 1,
    remedy: str = RESTORE,
) -> list[np.ndarray]:
    """``number_columns`` of text (``read_text``) whose first line is row ``first_row`` of ``file``.

    A million rows take well under a second where all is well; what is not plain digits is read
    again row by row, which can say which row is wrong and why.
    """
    columns = _quickly(data, separator, fields)
    if columns is None:
        return _carefully(data, separator, fields, table, file, first_row, remedy)
    return columns


def _quickly(data: bytes, separator: str, fields: Sequence[str]) -> list[np.ndarray] | None:
    """The columns, or None where anything at all is unusual.

    Arrow knows separators of one character: "::" is read as two of them with an empty column in
    between, which costs a fraction of replacing them.
    """
    delimiter, repeats = separator[0], len(separator)
    if separator != delimiter * repeats or data.translate(
        None, b"0123456789\n" + delimiter.encode()
    ):
        return None
    between = [[f"{name}, {i}" for i in range(1, repeats)] for name in fields]
    names = [name for field, empty in zip(fields, between, strict=True) for name in (field, *empty)]
    names = names[: len(names) - (repeats - 1)]  # nothing lies behind the last field
    types = {name: pa.int64() if name in fields else pa.null() for name in names}
    try:
        table = csv.read_csv(
            pa.BufferReader(data),
            read_options=csv.ReadOptions(column_names=names, block_size=_BLOCK),
            parse_options=csv.ParseOptions(
                delimiter=delimiter, quote_char=False, ignore_empty_lines=False
            ),
            convert_options=csv.ConvertOptions(column_types=types, null_values=[""]),
        )
    except pa.ArrowInvalid:
        return None
    columns = [table.column(field) for field in fields]
    if any(column.null_count for column in columns):
        return None
    return [column.to_numpy() for column in columns]


def _carefully(
    data: bytes,
    separator: str,
    fields: Sequence[str],
    table: str,
    file: str,
    first_row: int,
    remedy: str,
) -> list[np.ndarray]:
    columns: list[list[int]] = [[] for _ in fields]
    shown = ", ".join(fields)
    for row, line in enumerate(data.decode("latin-1").split("\n"), start=first_row):
        values = line.split(separator)
        if len(values) != len(fields):
            raise _wrong_width(table, file, row, line, len(values), len(fields), shown, remedy)
        for name, column, text in zip(fields, columns, values, strict=True):
            column.append(whole_number(table, file, row, name, text, remedy))
    return [np.array(column, dtype=np.int64) for column in columns]
