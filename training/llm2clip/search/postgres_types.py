"""The types of PostgreSQL and of Arrow, and values of them."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from pgvector import HalfVector, Vector

ARROW = {
    "text": pa.string(),
    "boolean": pa.bool_(),
    "smallint": pa.int16(),
    "integer": pa.int32(),
    "bigint": pa.int64(),
    "numeric": pa.uint64(),
    "real": pa.float32(),
    "double precision": pa.float64(),
    "date": pa.date32(),
    "timestamp without time zone": pa.timestamp("us"),
    "timestamp with time zone": pa.timestamp("us", "UTC"),
    "bytea": pa.binary(16),
}
# Arrow's types that PostgreSQL has under another name, or keeps in a wider type.
SQL_NAMES = {
    "large_string": "text", "int8": "smallint", "uint8": "smallint", "uint16": "integer", "uint32": "bigint",
    "halffloat": "real", "date64[ms]": "date",
}  # fmt: skip
VECTORS: dict[str, tuple[Any, pa.DataType]] = {"halfvec": (HalfVector, pa.float16()), "vector": (Vector, pa.float32())}


def sql_type(kind: pa.DataType) -> str:
    """Return the type of PostgreSQL for a column."""
    if pa.types.is_fixed_size_list(kind):
        name = "halfvec" if pa.types.is_float16(kind.value_type) else "vector"
        return f"{name}({kind.list_size})"
    if pa.types.is_timestamp(kind):
        return f"timestamp {'with' if kind.tz else 'without'} time zone"
    names = {str(there): name for name, there in ARROW.items()} | SQL_NAMES
    return names[str(kind)]


def sql_values(column: pa.ChunkedArray, kind: str) -> list[Any]:
    """Convert a column to values that psycopg writes as a type of PostgreSQL."""
    base = kind.partition("(")[0]
    if base in VECTORS:
        make, there = VECTORS[base]
        values = pa.concat_arrays(column.chunks).flatten().cast(there).to_numpy(zero_copy_only=False)
        return [make(row) for row in values.reshape(len(column), -1)]
    values = column.cast(ARROW[kind], safe=False).to_pylist()
    if kind not in ("text", "numeric"):
        return values
    return [value if value is None else without_zeros(value) if kind == "text" else Decimal(value) for value in values]


def arrow_batch(rows: Sequence[Sequence[Any]], names: Sequence[str], types: dict[str, str]) -> pa.RecordBatch:
    """Convert rows of the server."""
    columns = zip(*rows, strict=True) if rows else ([] for _ in names)
    arrays = []
    for name, values in zip(names, columns, strict=True):
        base, _, width = types.get(name, "bigint").partition("(")
        if base in VECTORS:
            joined = np.concatenate([value.to_numpy() for value in values]) if values else np.empty(0)
            flat = pa.array(joined.astype(VECTORS[base][1].to_pandas_dtype()), VECTORS[base][1])
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, int(width.rstrip(")"))))
        else:
            arrays.append(pa.array([int(v) if isinstance(v, Decimal) else v for v in values], ARROW[base]))
    return pa.RecordBatch.from_arrays(arrays, list(names))


def without_zeros(text: str) -> str:
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")  # no text of PostgreSQL has one
