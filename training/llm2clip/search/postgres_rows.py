"""The rows of an index in PostgreSQL: their types, reading and searching."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, Protocol

import numpy as np
import psycopg
import pyarrow as pa
from pgvector import HalfVector, Vector
from psycopg import errors, sql

from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.index_rows import INTERNAL, NUMBER, VECTOR, Found
from llm2clip.search.postgres_database import PostgresDatabase, require_condition

SCAN_ROWS = 8192
# Rows that fulfil a condition, up to which comparing all of them costs less than searching the graph for them.
EXACT_MATCHES = 20_000
# pgvector's own limit; it goes on in steps of as many until it has `top` rows.
MAX_EF_SEARCH = 1000
# What a row must agree on with the index that was opened.
SAME = ("vision_fingerprint", "text_fingerprint", "width", "dtype", "source")
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
    if kind == "text":  # which ends at no zero
        return [value if value is None else value.replace("\0", "\N{REPLACEMENT CHARACTER}") for value in values]
    return [value if value is None else Decimal(value) for value in values] if kind == "numeric" else values


def arrow_array(values: Sequence[Any], kind: str) -> pa.Array:
    """Convert values of a column of PostgreSQL."""
    base = kind.partition("(")[0]
    if base in VECTORS:
        width = int(kind.partition("(")[2].rstrip(")"))
        joined = np.concatenate([value.to_numpy() for value in values]) if values else np.empty(0)
        return pa.FixedSizeListArray.from_arrays(pa.array(joined, VECTORS[base][1]), width)
    return pa.array([int(v) if isinstance(v, Decimal) else v for v in values], ARROW[kind])


def names(columns: Sequence[str]) -> sql.Composed:
    """Quote the names of columns."""
    return sql.SQL(", ").join(map(sql.Identifier, columns))


class TableReader:
    """Rows of one table, or of two together.

    Args:
        types: Types of the columns, by name.
    """

    def __init__(self, database: PostgresDatabase, types: dict[str, str]) -> None:
        self.database = database
        self.types = types
        self.columns = [name for name in types if name not in INTERNAL]
        # Type and parameters of the index of the embeddings, and their number.
        self.index: dict[str, Any] = {"type": "flat"}
        self.images = 0

    def _source(self) -> sql.Composable:
        """Return what a query has to read from. Its parameters are those of `_parameters`."""
        raise NotImplementedError

    def _parameters(self) -> dict[str, Any]:
        return {}

    @contextlib.contextmanager
    def _reading(self, where: str | None = None) -> Iterator[psycopg.Connection[Any]]:
        with self.database.readable(), self.database.snapshot() as connection:
            try:
                yield connection
            except (psycopg.ProgrammingError, psycopg.DataError) as error:
                if not where or isinstance(error, (errors.InsufficientPrivilege, errors.UndefinedTable)):
                    raise
                raise self._no_condition(where, self.database.reason(error)) from error

    def _condition(self, where: str | None) -> sql.Composable:
        try:
            return require_condition(where) if where else sql.SQL("true")
        except ValueError as error:
            raise self._no_condition(where, str(error)) from None

    def _no_condition(self, where: str | None, reason: str) -> ValueError:
        columns = ", ".join(self.columns)
        return ValueError(f"where is {where!r}, which is no condition on the columns {columns}: {reason}.")

    def count(self, where: str | None = None) -> int:
        with self._reading(where) as connection:
            query = sql.SQL("SELECT count(*) FROM {} WHERE ({})").format(self._source(), self._condition(where))
            (count,) = connection.execute(query, self._parameters()).fetchone() or (0,)
            return int(count)

    def scan(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        wanted = [*columns, NUMBER]
        query = sql.SQL("SELECT {} FROM {} WHERE ({}) ORDER BY {}").format(
            names(wanted), self._source(), self._condition(where), sql.Identifier(NUMBER)
        )
        with self._reading(where) as connection, connection.cursor("scan", binary=True) as cursor:
            cursor.execute(query, self._parameters())
            while rows := cursor.fetchmany(SCAN_ROWS):
                yield self._batch(rows, wanted)

    def take(self, numbers: np.ndarray, columns: Sequence[str]) -> pa.Table:
        wanted, places = np.unique(numbers, return_inverse=True)
        query = sql.SQL("SELECT {} FROM {} WHERE {} = ANY(%(wanted)s)").format(
            names([*columns, NUMBER]), self._source(), sql.Identifier(NUMBER)
        )
        with self._reading() as connection, connection.cursor(binary=True) as cursor:
            rows = cursor.execute(query, {"wanted": wanted.tolist(), **self._parameters()}).fetchall()
        found = pa.Table.from_batches([self._batch(rows, [*columns, NUMBER])])
        order = np.argsort(found[NUMBER].to_numpy())
        return found.take(pa.array(order[places])).drop_columns([NUMBER])

    def search(self, queries: np.ndarray, top: int, where: str | None = None) -> Found:
        with self._reading(where) as connection:
            effort = self._effort(connection, top, where)
            return [self._nearest(connection, query, top, where, effort) for query in queries]

    def _effort(self, connection: psycopg.Connection[Any], top: int, where: str | None) -> int | None:
        """Return how many candidates a search of the graph compares at a time; None if it is left out."""
        if self.index["type"] == "flat":
            return None
        effort = max(self.index["ef_search"], top)
        if where:
            query = sql.SQL("EXPLAIN (FORMAT JSON) SELECT FROM {} WHERE ({})").format(
                self._source(), self._condition(where)
            )
            ((plan,),) = connection.execute(query, self._parameters()).fetchall()
            matches = max(1, plan[0]["Plan"]["Plan Rows"])  # as the server estimates
            if matches <= EXACT_MATCHES:
                return None
            # The fewer rows fulfil a condition, the more candidates it rejects.
            effort = max(effort, effort * self.images // matches)
        return min(effort, MAX_EF_SEARCH)

    def _nearest(
        self, connection: psycopg.Connection[Any], query: np.ndarray, top: int, where: str | None, effort: int | None
    ) -> list[tuple[float, dict[str, Any]]]:
        kind = self.types[VECTOR]
        make = VECTORS[kind.partition("(")[0]][0]
        vector, columns = sql.Identifier(VECTOR), names(self.columns)
        distance = sql.SQL("({} <#> %(query)s)").format(vector)
        statement = sql.SQL("SELECT {}, {} FROM {} WHERE ({}) ORDER BY {} LIMIT %(top)s")
        parts = columns, distance, self._source(), self._condition(where)
        values = {"query": make(np.asarray(query)), "top": top, **self._parameters()}
        cursor, rows = connection.cursor(binary=True), []
        if effort is not None:
            graph = {"hnsw.iterative_scan": "strict_order", "hnsw.ef_search": str(effort)}
            for name, value in graph.items():
                connection.execute("SELECT set_config(%s, %s, true)", (name, value))
            rows = cursor.execute(statement.format(*parts, distance), values).fetchall()
        # The graph gives up where a condition rejects nearly all rows; comparing all finds the rest.
        if len(rows) < top:
            # No index has the order of a sum.
            rows = cursor.execute(statement.format(*parts, distance + sql.SQL(" + 0")), values).fetchall()
        described = self._batch([row[:-1] for row in rows], self.columns).to_pylist()
        return [(-float(row[-1]), description) for row, description in zip(rows, described, strict=True)]

    def _batch(self, rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> pa.RecordBatch:
        types = {**self.types, NUMBER: "bigint"}
        values = zip(*rows, strict=True) if rows else ([] for _ in columns)
        arrays = [arrow_array(found, types[name]) for name, found in zip(columns, values, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, list(columns))


class PostgresRows(TableReader):
    """The rows of the complete index; see [`IndexRows`].

    Each call sees one state of the index, that of the time of the call: an update that ends between two calls is seen
    by the second. An index that another model has made since it was opened is an error.
    """

    def __init__(self, store: CompleteIndex, manifest: IndexManifest) -> None:
        super().__init__(store.database, manifest.stored["columns"])
        self.store = store
        self.manifest = manifest

    def _source(self) -> sql.Composable:
        return self.store.table

    @contextlib.contextmanager
    def _reading(self, where: str | None = None) -> Iterator[psycopg.Connection[Any]]:
        with super()._reading(where) as connection:
            # The name and the rows of the table have to be those of the manifest that is read next.
            connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(self.store.table))
            now = self.store.manifest()
            if now is None or any(getattr(now, name) != getattr(self.manifest, name) for name in SAME):
                raise ChangedError(f"the index {self.store.place} was replaced since it was opened; search again.")
            self.index, self.images = now.index, now.images
            yield connection


class CompleteIndex(Protocol):
    """Where the rows of a complete index are."""

    place: str
    database: PostgresDatabase
    table: sql.Identifier

    def manifest(self) -> IndexManifest | None:
        """Read the manifest."""
        ...


class ChangedError(ValueError):
    """An index is no longer the one that was opened."""
