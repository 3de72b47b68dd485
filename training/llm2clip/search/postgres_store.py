"""An index in PostgreSQL with pgvector: a table of rows, and one with its manifest.

Each row has the number of the commit from which on it is found, and searches leave out rows of later ones. So what a
run adds is stored part by part, each in a transaction of its own, and becomes visible with the manifest, in the last
one, which also deletes what is gone. An index that replaces one with other columns has its own beside them until then.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
from psycopg import errors, sql

from llm2clip.files.locks import PATIENCE
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.postgres_database import PostgresDatabase, set_session
from llm2clip.search.postgres_types import ARROW, VECTORS, arrow_batch, sql_type, sql_values, without_zeros
from llm2clip.search.store import INTERNAL, MORE, NUMBER, REASON, UNINDEXED, VECTOR, Base, is_changed, rows_in_order
from llm2clip.search.where import Conditions, parse_where

logger = logging.getLogger(__name__)

SCHEMA = "llm2clip"
# Letters that need no quotes in SQL; PostgreSQL cuts names after 63.
TABLE_NAME = re.compile(r"(?:([a-z_][a-z0-9_]{0,62})\.)?([a-z_][a-z0-9_]{0,47})")
# A run is silent while it embeds, and an index of many embeddings takes hours.
UNLIMITED = {"statement_timeout": "0", "idle_session_timeout": "0"}
# The comment on each of our tables, by which they are known.
MARK = "written by llm2clip index"
GENERATION = "_generation"
COMMITTED, UNFINISHED = "committed", "begun"
SCAN_ROWS = 8192
# Rows that fulfil a condition, up to which comparing all of them costs less than searching the graph for them.
EXACT_MATCHES = 20_000
# pgvector's own limit; it continues in steps of as many until it has `k` rows.
MAX_EF_SEARCH = 1000
# What a row must agree on with the index that was opened.
SAME = ("image_fingerprint", "text_fingerprint", "width", "stored_dtype", "source")


class PostgresStore:
    """The index in two tables of a database: `NAME` has its rows, `NAME_llm2clip` its manifest; see [`IndexStore`].

    A search sees one state of the index: the last commit before the call. An index that another model has made since
    it was opened is an error.

    Args:
        url: See [`PostgresDatabase`].
        table: `NAME`, in the schema `llm2clip`, or `SCHEMA.NAME`.
    """

    index_types: tuple[str, ...] = ("flat", "hnsw")

    def __init__(self, url: str, table: str) -> None:
        self.database = PostgresDatabase(url)
        match = TABLE_NAME.fullmatch(table)
        if match is None:
            raise ValueError(
                f"table is {table!r}, but it has to be NAME or SCHEMA.NAME, of lower-case letters, digits and _, and "
                "NAME of at most 48; the schema is llm2clip if it is left out."
            )
        self.schema, self.name = match[1] or SCHEMA, match[2]
        self.location = f"{self.schema}.{self.name} in {self.database.name}"
        self.table, self.state = (f'"{self.schema}"."{self.name}{suffix}"' for suffix in ("", "_llm2clip"))
        self._opened: IndexManifest | None = None
        # A run has the types of its columns, what they are called until its end, the generations that it consists
        # of, and the rows that it deletes.
        self._types: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._first = self._generation = 0
        self._gone = np.empty(0, np.int64)
        self._is_changed = False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        key = hashlib.blake2b(f"{self.schema}.{self.name}".encode(), digest_size=8).digest()
        with self.database.readable():
            for name in (self.name, f"{self.name}_llm2clip"):
                if self._comment(name) not in (None, MARK):
                    raise FileExistsError(
                        f"the table {self.schema}.{name} in {self.database.name} is not replaced, because llm2clip "
                        "index did not write it; choose another --table, or drop it yourself."
                    )
            set_session(self.database.connection, {"lock_timeout": f"{PATIENCE:.0f}s", **UNLIMITED})
            try:
                # A killed run keeps its lock until its worker processes have noticed, after a few seconds.
                self._execute("SELECT pg_advisory_lock(%s::bigint)", [int.from_bytes(key, "big", signed=True)])
            except errors.LockNotAvailable:
                self.database.close()
                raise ValueError(f"another run is writing {self.location}; wait until it has ended.") from None
        try:
            yield
        finally:
            # What a lost connection leaves is found by the next run.
            with contextlib.suppress(ValueError, OSError), self.database.readable():
                is_unfinished = self._state(COMMITTED) is None and self._comment(self.name)
                if is_unfinished and not self._query(f"SELECT FROM {self.table} LIMIT 1"):
                    self._execute(f"DROP TABLE {self.table}, {self.state}")
            self.database.close()  # with the lock, in whichever state an error has left the connection

    def metadata(self, unfinished: bool = False) -> IndexManifest | None:
        with self.database.readable():
            manifest = self._manifest(UNFINISHED if unfinished else COMMITTED)
        if manifest is not None and not unfinished:
            self._opened = manifest
        return manifest

    def begin(self, manifest: IndexManifest, schema: pa.Schema, base: Base) -> None:
        self._types = {name: sql_type(schema.field(name).type) for name in schema.names}
        self._gone, self._is_changed = np.empty(0, np.int64), base != "commit"
        with self.database.readable(), self.database.connection.transaction():
            self._create()
            committed, unfinished = (self._state(name) for name in (COMMITTED, UNFINISHED))
            self._generation = 1 + (committed[0]["stored"]["generation"] if committed else 0)
            if base == "unfinished":
                assert unfinished is not None
                self._first, self._names = (unfinished[0]["stored"][name] for name in ("generation", "names"))
                return
            self._execute(f"DELETE FROM {self.table} WHERE {GENERATION} >= {self._generation}")
            # Which rows the new index will consist of.
            self._first = self._generation if base == "nothing" else 0
            kept, added = committed[0]["stored"]["columns"] if committed else {}, set[str]()
            if unfinished is not None:
                added = set(unfinished[0]["stored"]["names"].values()) - set(kept)
            self._change_columns(kept, self._types if base == "nothing" else kept, dropped=added)
            manifest.stored = {"columns": self._types, "generation": self._first, "names": self._names}
            self._write_state(UNFINISHED, manifest, [])

    def _create(self) -> None:
        """Create the tables that do not exist; for use in a transaction."""
        if not self._query("SELECT FROM pg_namespace WHERE nspname = %s", self.schema):
            self._execute(f"CREATE SCHEMA {_quoted(self.schema)}")
        state = "state text PRIMARY KEY, manifest json, failures json"
        rows = f"{NUMBER} bigserial PRIMARY KEY, {GENERATION} integer NOT NULL"
        for table, name, columns in ((self.state, f"{self.name}_llm2clip", state), (self.table, self.name, rows)):
            if self._comment(name) is None:
                self._execute(f"CREATE TABLE {table} ({columns})")
                self._execute(f"COMMENT ON TABLE {table} IS '{MARK}'")

    def _change_columns(self, kept: dict[str, str], types: dict[str, str], dropped: set[str]) -> None:
        """Give the table columns beside those of the last commit; rights on it stay. For use in a transaction."""
        free = (name for name in map("_new{}".format, itertools.count()) if name not in {*kept, *types})
        self._names = {name: name if kept.get(name, kind) == kind else next(free) for name, kind in types.items()}
        changes = [f"DROP COLUMN {_quoted(name)} CASCADE" for name in dropped]
        for name, kind in types.items():
            if self._names[name] not in kept:
                changes.append(f"ADD COLUMN {_quoted(self._names[name])} {kind}")
        if changes:
            self._execute(f"ALTER TABLE {self.table} {', '.join(changes)}")

    def _written(self, names: Sequence[str]) -> list[str]:
        """Return what columns of this run are called until its end."""
        return [self._names.get(name, name) for name in names]

    def keys(self, columns: Sequence[str] | None, written: bool = False) -> Iterator[pa.RecordBatch]:
        with self._reading(written) as (types, visible):
            names = [*(_shown(types) if columns is None else columns), NUMBER]
            columns = self._written(names) if written else names
            query = f"SELECT {_list(columns)} FROM {self.table} WHERE {visible} ORDER BY {NUMBER}"
            with self.database.connection.cursor("scan", binary=True) as cursor:
                cursor.execute(sql.SQL(query), {"gone": self._gone.tolist()})
                while rows := cursor.fetchmany(SCAN_ROWS):
                    yield arrow_batch(rows, names, types)

    def vectors(self, numbers: np.ndarray) -> pa.Table:
        names = [VECTOR, REASON, NUMBER]
        with self._reading(True) as (types, _):
            query = f"SELECT {_list(self._written(names))} FROM {self.table} WHERE {NUMBER} = ANY(%s)"
            rows = self._execute(query, [np.unique(numbers).tolist()], binary=True).fetchall()
        return rows_in_order(pa.Table.from_batches([arrow_batch(rows, names, types)]), numbers)

    def upsert(self, rows: pa.Table) -> None:
        self._is_changed = True
        columns = [sql_values(rows[name], kind) for name, kind in self._types.items()]
        names = _list([GENERATION, *self._written(list(self._types))]).replace("%%", "%")  # without parameters
        statement = f"COPY {self.table} ({names}) FROM STDIN WITH (FORMAT BINARY)"
        with self.database.readable(), self.database.connection.cursor().copy(sql.SQL(statement)) as copy:
            copy.set_types(["integer", *(kind.partition("(")[0] for kind in self._types.values())])
            for row in zip(*columns, strict=True):
                copy.write_row((self._generation, *row))

    def delete(self, numbers: np.ndarray) -> None:
        self._gone = np.union1d(self._gone, numbers)
        self._is_changed |= bool(len(numbers))

    def commit(self, manifest: IndexManifest, failures: list[dict[str, Any]]) -> None:
        with self.database.readable():
            _, listed = self._state(COMMITTED) or (None, None)
            if self._is_changed or is_changed(manifest, failures, self._manifest(COMMITTED), listed):
                version = self.database.connection.info.parameter_status("server_version")
                manifest.record_versions(postgresql=str(version))
                manifest.stored = {"columns": self._types, "generation": self._generation}
                self._finish(manifest, failures, self._index(manifest.index))
            else:
                self._execute(f"DELETE FROM {self.state} WHERE state = %s", [UNFINISHED])

    def _finish(self, manifest: IndexManifest, failures: list[dict[str, Any]], replaced: list[str]) -> None:
        """Let searches see the rows of this run, in one transaction."""
        with self.database.connection.transaction():
            gone = f"{REASON} IS NOT NULL OR {GENERATION} < {self._first} OR {NUMBER} = ANY(%s)"
            self._execute(f"DELETE FROM {self.table} WHERE {gone}", [self._gone.tolist()])
            for name in replaced:
                self._execute(f"DROP INDEX {_quoted(self.schema)}.{_quoted(name)}")
            committed = self._state(COMMITTED)
            for name in set(committed[0]["stored"]["columns"] if committed else ()) - set(self._names.values()):
                self._execute(f"ALTER TABLE {self.table} DROP COLUMN {_quoted(name)} CASCADE")
            for name, now in self._names.items():
                if now != name:
                    self._execute(f"ALTER TABLE {self.table} RENAME COLUMN {_quoted(now)} TO {_quoted(name)}")
            self._execute(f"DELETE FROM {self.state}")
            self._write_state(COMMITTED, manifest, failures)
        self._execute(f"ANALYZE {self.table}")

    def _index(self, index: dict[str, Any]) -> list[str]:
        """Index the columns and the embeddings; return the names of graphs that this one replaces.

        The table stays readable meanwhile, and its rows join the graph that there is.
        """
        have = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = %s AND tablename = %s"
        built = {str(name): str(definition) for name, definition in self._query(have, self.schema, self.name)}
        for column in self._written(sorted(set(self._types) - UNINDEXED)):
            if any(definition.endswith((f"({_quoted(column)})", f"({column})")) for definition in built.values()):
                continue
            try:
                self._execute(f"CREATE INDEX ON {self.table} ({_quoted(column)})")
            except errors.ProgramLimitExceeded:
                logger.info("the column %s gets no index: its values are too long.", column)
        graphs = {name: known for name, known in built.items() if "USING hnsw" in known}
        if index["type"] != "hnsw":
            return list(graphs)
        operators = f"{self._types[VECTOR].partition('(')[0]}_cosine_ops"
        options = f"WITH (m='{index['m']}', ef_construction='{index['ef_construction']}')"
        definition = f"USING hnsw ({self._names[VECTOR]} {operators}) {options}"
        same = [name for name, known in graphs.items() if known.endswith(definition)]
        if not same:
            logger.info("indexing the embeddings.")
            self._execute(f"CREATE INDEX ON {self.table} {definition}")
        return [name for name in graphs if name not in same[:1]]

    def search(self, queries: np.ndarray, k: int, where: str | None = None) -> list[pa.Table]:
        with self._reading(False) as (types, visible):
            condition, values = self._condition(where, types)
            condition = f"{visible} AND ({condition})"
            effort = self._effort(condition if where else None, values, k + MORE)
            if effort is not None:
                for name, value in (("iterative_scan", "strict_order"), ("ef_search", str(effort))):
                    self._execute("SELECT set_config(%s, %s, true)", [f"hnsw.{name}", value])
            names = [*_shown(types), VECTOR]
            make = VECTORS[types[VECTOR].partition("(")[0]][0]
            # Not the inner product: in 16 bits, rows have not quite unit length.
            distance = f"{VECTOR} <=> %(query)s"
            query = f"SELECT {_list(names)} FROM {self.table} WHERE {condition} ORDER BY "
            in_graph, exact = (f"{query}{order} LIMIT %(k)s" for order in (distance, f"({distance}) + 0"))
            nearest = []
            for row in queries:
                values |= {"query": make(row), "k": k + MORE}
                rows = self._execute(in_graph, values, binary=True).fetchall() if effort is not None else []
                # The graph gives up where a condition rejects nearly all rows; no index has the order of a sum.
                if len(rows) < k:
                    rows = self._execute(exact, values, binary=True).fetchall()
                nearest.append(pa.Table.from_batches([arrow_batch(rows, names, types)]))
            return nearest

    def _effort(self, condition: str | None, values: dict[str, Any], candidates: int) -> int | None:
        """Return how many candidates a search of the graph compares at a time; None if it is left out."""
        assert self._opened is not None
        if self._opened.index["type"] == "flat":
            return None
        effort = max(self._opened.index["ef_search"], candidates)
        if condition is not None:
            ((plan,),) = self._execute(f"EXPLAIN (FORMAT JSON) SELECT FROM {self.table} WHERE {condition}", values)
            matches = max(1, plan[0]["Plan"]["Plan Rows"])  # as the server estimates
            if matches <= EXACT_MATCHES:
                return None
            # The fewer rows fulfil a condition, the more candidates it rejects.
            effort = max(effort, effort * self._opened.images // matches)
        return min(effort, MAX_EF_SEARCH)

    @contextlib.contextmanager
    def _reading(self, written: bool) -> Iterator[tuple[dict[str, str], str]]:
        """Begin a transaction that cannot write; yield the types of the columns, and which rows are seen."""
        with self.database.readable(), self.database.snapshot():
            if written:
                visible = f"{GENERATION} >= {self._first} AND NOT {NUMBER} = ANY(%(gone)s::bigint[])"
                yield self._types, visible
                return
            # The name and the rows of the table have to be those of the manifest that is read next.
            self._execute(f"LOCK TABLE {self.table} IN ACCESS SHARE MODE")
            now = self._manifest(COMMITTED)
            if now is None or any(getattr(now, name) != getattr(self._opened, name) for name in SAME):
                raise ValueError(f"the index {self.location} was replaced since it was opened; search again.")
            self._opened = now
            yield now.stored["columns"], f"{GENERATION} <= {now.stored['generation']}"

    def _condition(self, where: str | None, types: dict[str, str]) -> tuple[str, dict[str, Any]]:
        """Return a condition with the values that are bound in it."""
        if where is None:
            return "true", {}
        bound, columns = _BoundConditions(), {name: ARROW[types[name]] for name in _shown(types)}
        return parse_where(where, columns, bound), bound.values

    def _execute(
        self, statement: str, values: Sequence[Any] | Mapping[str, Any] = (), binary: bool = False
    ) -> psycopg.Cursor[Any]:
        return self.database.connection.execute(sql.SQL(statement), values, binary=binary)

    def _query(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._execute(query, values).fetchall()

    def _comment(self, name: str) -> str | None:
        """Return the comment on a table, which may be empty; None if there is no table of this name."""
        query = (
            "SELECT coalesce(obj_description(c.oid, 'pg_class'), ''), relkind FROM pg_class c JOIN pg_namespace n ON "
            "n.oid = relnamespace WHERE nspname = %s AND relname = %s"
        )
        tables = self._query(query, self.schema, name)
        return (str(tables[0][0]) if tables[0][1] == "r" else "") if tables else None

    def _state(self, state: str) -> tuple[dict[str, Any], Any] | None:
        """Return a manifest and its failures."""
        if self._comment(f"{self.name}_llm2clip") != MARK:
            return None
        return self._execute(f"SELECT manifest, failures FROM {self.state} WHERE state = %s", [state]).fetchone()

    def _manifest(self, state: str) -> IndexManifest | None:
        stored = self._state(state)
        return None if stored is None else IndexManifest.from_fields(self.location, stored[0])

    def _write_state(self, state: str, manifest: IndexManifest, failures: list[dict[str, Any]]) -> None:
        self._execute(f"DELETE FROM {self.state} WHERE state = %s", [state])
        values = [state, json.dumps(asdict(manifest)), json.dumps(failures)]
        self._execute(f"INSERT INTO {self.state} VALUES (%s, %s, %s)", values)


class _BoundConditions(Conditions):
    """Conditions whose values are parameters."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def column(self, name: str) -> str:
        return _quoted(name)

    def value(self, value: pa.Scalar) -> str:
        if pa.types.is_timestamp(value.type):
            value = value.cast(pa.timestamp("us", value.type.tz))
        return self._bind(value.as_py())

    def _bind(self, value: Any) -> str:
        name = f"value{len(self.values)}"
        self.values[name] = without_zeros(value) if isinstance(value, str) else value
        return f"%({name})s"

    def compared(self, column: str, operator: str, value: pa.Scalar) -> str:
        # Strings have the order of their code points, as elsewhere, and not the order of a language.
        order = ' COLLATE "C"' if pa.types.is_string(value.type) and operator not in ("=", "<>") else ""
        return f"{_quoted(column)}{order} {operator} {self.value(value)}"

    def like(self, column: str, negation: str, pattern: str) -> str:
        return f"{_quoted(column)} {negation}LIKE {self._bind(pattern)} ESCAPE ''"


def _shown(types: dict[str, str]) -> list[str]:
    return [name for name in types if name not in INTERNAL]


def _quoted(name: str) -> str:
    """Quote a name for a statement with parameters."""
    return sql.Identifier(name).as_string().replace("%", "%%")


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(_quoted, names))
