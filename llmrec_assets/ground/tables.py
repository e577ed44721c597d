"""Tables as declared: a frame in, an Arrow table that matches its schema out, and its version.

What belongs here: conforming to a schema and hashing content. What does not: where tables live
(``store``), which columns there are (``schemas``).
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec_assets.ground.errors import StoreError

if TYPE_CHECKING:
    import pandas as pd


def conform(frame: pd.DataFrame, schema: pa.Schema, what: str) -> pa.Table:
    """The frame as an Arrow table with exactly the schema's columns, by name.

    An empty frame is a table with zero rows.

    Raises:
        StoreError: a column is missing, superfluous, there twice or of another kind, or a column
            that may not be NULL holds one; names table and column.
    """
    import pandas as pd

    missing = [name for name in schema.names if name not in frame.columns]
    extra = [str(name) for name in frame.columns if name not in schema.names]
    twice = [str(name) for name in frame.columns[frame.columns.duplicated()].unique()]
    if missing or extra or twice:
        raise StoreError(
            f"{what}: the columns do not match the declared schema"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; not declared: {', '.join(extra)}" if extra else "")
            + (f"; there twice: {', '.join(twice)}" if twice else "")
        )
    columns = []
    for field in schema:
        series = frame[field.name]
        # Arrow would read numbers out of text silently.
        if isinstance(series.dtype, pd.StringDtype) and not pa.types.is_string(field.type):
            if series.notna().any():
                raise StoreError(f"{what}.{field.name}: holds text (declared {field.type})")
            series = series.astype(object)
        try:
            column = pa.Array.from_pandas(series, type=field.type)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise StoreError(f"{what}.{field.name}: {error} (declared {field.type})") from error
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        columns.append(column)
    table = pa.Table.from_arrays(columns, schema=schema)
    require(table, schema, what)
    return table


def require(table: pa.Table, schema: pa.Schema, what: str) -> None:
    """Refuses a table that is not as declared.

    Raises:
        StoreError: its schema is another, or a column that may not be NULL holds one.
    """
    if not table.schema.equals(schema):
        raise StoreError(
            f"{what}: the table does not have the declared schema; expected "
            + ", ".join(f"{field.name} {field.type}" for field in schema)
        )
    for field in schema:
        column = table.column(field.name)
        if column.null_count and not field.nullable:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise StoreError(f"{what}.{field.name}: row {row} is NULL, declared NOT NULL")


def content_version(table: pa.Table) -> str:
    """16 hex digits over names, types and values: equal content, equal version.

    Hashes values, not bytes of a file, so that another Parquet or Arrow release gives the same
    version; row order counts.
    """
    digest = hashlib.sha256()
    for field in table.schema:
        digest.update(f"{field.name}:{_type_name(field.type)};".encode())
        column = table.column(field.name)
        _hash_array(
            digest,
            pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=field.type),
        )
    return digest.hexdigest()[:16]


def _type_name(type_: pa.DataType) -> str:
    """The type without the name of a list's values, which Parquet changes on the way."""
    if pa.types.is_list(type_):
        return f"list<item: {_type_name(type_.value_type)}>"
    return str(type_)


def _hash_array(digest: hashlib._Hash, array: pa.Array) -> None:
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    digest.update(len(array).to_bytes(8, "little"))
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    digest.update(np.packbits(valid).tobytes())
    if pa.types.is_list(array.type):
        # A NULL list hashes like an empty one here; the validity bits above tell them apart.
        lengths = pc.fill_null(pc.list_value_length(array), 0)
        digest.update(lengths.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        _hash_array(digest, pc.list_flatten(array))
    elif pa.types.is_string(array.type):
        encoded = pc.fill_null(pc.binary_length(array), 0)
        digest.update(encoded.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        digest.update("".join(pc.fill_null(array, "").to_pylist()).encode())
    else:
        if pa.types.is_date(array.type):
            array = array.cast(pa.int32())
        elif pa.types.is_boolean(array.type):
            array = array.cast(pa.int8())
        values = pc.fill_null(array, 0).to_numpy(zero_copy_only=False)
        digest.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes())


def to_frame(table: pa.Table) -> pd.DataFrame:
    """An Arrow table as a frame: lists are Python lists, nullable integers keep their NULLs."""
    import pandas as pd

    nullable = _nullable()
    frame = table.to_pandas(types_mapper=nullable.get, date_as_object=True)
    for field in table.schema:
        if pa.types.is_list(field.type):
            frame[field.name] = pd.Series(
                table.column(field.name).to_pylist(), index=frame.index, dtype=object
            )
        elif not field.nullable and field.type in nullable:
            frame[field.name] = frame[field.name].astype(field.type.to_pandas_dtype())
    return frame


@functools.cache
def _nullable() -> dict[pa.DataType, pd.api.extensions.ExtensionDtype]:
    """Arrow's integers → pandas' with NULLs."""
    import pandas as pd

    return {
        pa.int8(): pd.Int8Dtype(),
        pa.int16(): pd.Int16Dtype(),
        pa.int32(): pd.Int32Dtype(),
        pa.int64(): pd.Int64Dtype(),
    }
