"""An index in PostgreSQL with pgvector: a table of rows, and one with its manifest.

A run writes a table beside the one that there is, and takes its place in one transaction, so that all searches see one
or the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
from psycopg import errors, sql

from llm2clip.files.locks import PATIENCE
from llm2clip.search.index_manifest import REPAIR, IndexManifest
from llm2clip.search.postgres_database import PostgresDatabase, set_session
from llm2clip.search.postgres_types import ARROW, VECTORS, arrow_batch, sql_type, sql_values, without_zeros
from llm2clip.search.store import INTERNAL, MORE, UNINDEXED, VECTOR
from llm2clip.search.where import Conditions, parse_where

logger = logging.getLogger(__name__)

SCHEMA = "llm2clip"
# Letters that need no quotes in SQL; PostgreSQL cuts names after 63.
TABLE_NAME = re.compile(r"(?:([a-z_][a-z0-9_]{0,62})\.)?([a-z_][a-z0-9_]{0,47})")
# An index of many embeddings takes hours.
UNLIMITED = {"statement_timeout": "0", "idle_session_timeout": "0"}
# The comments on each of our tables, by which they are known.
MARK, UNFINISHED = "written by llm2clip index", "an unfinished index of llm2clip index"
SCAN_ROWS = 8192
# Rows that fulfil a condition, up to which comparing all of them costs less than searching the graph for them.
EXACT_MATCHES = 20_000
# pgvector's own limit; it continues in steps of as many until it has `k` rows.
MAX_EF_SEARCH = 1000


class PostgresStore:
    """The index in two tables of a database: `NAME` has its rows, `NAME_llm2clip` its manifest; see [`IndexStore`].

    A search sees the index as it is at the call. One that another model has made since it was opened is an error.

    Args:
        url: See [`PostgresDatabase`].
        table: `NAME`, in the schema `llm2clip`, or `SCHEMA.NAME`.
    """

    index_types: tuple[str, ...] = ("flat", "hnsw")
    local_folder: Path | None = None

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
        self.table, self.state, self.new = (
            f'"{self.schema}"."{self.name}{suffix}"' for suffix in ("", "_llm2clip", "_llm2clip_new")
        )
        self._opened: IndexManifest | None = None

    def require_own(self) -> None:
        with self.database.readable():
            for suffix, mark in (("", MARK), ("_llm2clip", MARK), ("_llm2clip_new", UNFINISHED)):
                if self._comment(f"{self.name}{suffix}") not in (None, mark):
                    raise FileExistsError(
                        f"the table {self.schema}.{self.name}{suffix} in {self.database.name} is not replaced, "
                        "because llm2clip index did not write it; choose another --table, or drop it yourself."
                    )
            with self.database.connection.transaction(force_rollback=True):
                self._create_state()
                self._execute(f'CREATE TABLE "{self.schema}"."{self.name}_llm2clip_tried" ()')
        self.database.close()  # which would be silent for as long as a run embeds

    def metadata(self) -> IndexManifest | None:
        with self.database.readable():
            return self._manifest()

    def open(self) -> IndexManifest | None:
        manifest = self._opened = self.metadata()
        if manifest is not None:
            with self._reading():
                ((count,),) = self._query(f"SELECT count(*) FROM {self.table}")
                manifest = self._opened
            assert manifest is not None
            if count != manifest.images:
                raise ValueError(
                    f"the index {self.location} is damaged: its manifest lists {manifest.images} {manifest.embed}s, "
                    f"and its table has {count}; {REPAIR}"
                )
        return manifest

    def keys(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with self._reading() as types, self.database.connection.cursor("scan", binary=True) as cursor:
            cursor.execute(sql.SQL(f"SELECT {_list(columns)} FROM {self.table}"), {})
            while rows := cursor.fetchmany(SCAN_ROWS):
                yield arrow_batch(rows, columns, types)

    def replace(self, manifest: IndexManifest, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
        types = {name: sql_type(schema.field(name).type) for name in schema.names}
        try:
            with self.database.readable():
                self._lock()
                self._create(types)
                self._copy(types, batches)
                self._index(manifest.index, types)
                self._execute(f"ANALYZE {self.new}")
                version = self.database.connection.info.parameter_status("server_version")
                manifest.record_versions(postgresql=str(version))
                manifest.stored = {"columns": types}
                self._swap(manifest)
        finally:
            self.database.close()  # with the lock, in whichever state an error has left the connection

    def _lock(self) -> None:
        """Keep other runs from writing the index, on this machine or another one, while the connection is open."""
        key = hashlib.blake2b(f"{self.schema}.{self.name}".encode(), digest_size=8).digest()
        set_session(self.database.connection, {"lock_timeout": f"{PATIENCE:.0f}s", **UNLIMITED})
        try:
            # A killed run keeps its lock until the server has noticed, after a few seconds.
            self._execute("SELECT pg_advisory_lock(%s::bigint)", [int.from_bytes(key, "big", signed=True)])
        except errors.LockNotAvailable:
            raise ValueError(f"another run is writing {self.location}; wait until it has ended.") from None
        set_session(self.database.connection, {"lock_timeout": "0"})

    def _create_state(self) -> None:
        """Create the schema and the table of the manifest, if they do not exist."""
        if not self._query("SELECT FROM pg_namespace WHERE nspname = %s", self.schema):
            self._execute(f"CREATE SCHEMA {_quoted(self.schema)}")
        if self._comment(f"{self.name}_llm2clip") is None:
            self._execute(f"CREATE TABLE {self.state} (manifest json)")
            self._execute(f"COMMENT ON TABLE {self.state} IS '{MARK}'")

    def _create(self, types: dict[str, str]) -> None:
        """Create the new table."""
        columns = ", ".join(f"{_quoted(name)} {kind}" for name, kind in types.items())
        with self.database.connection.transaction():
            self._create_state()
            self._execute(f"DROP TABLE IF EXISTS {self.new}")  # of a killed run
            self._execute(f"CREATE TABLE {self.new} ({columns})")
            self._execute(f"COMMENT ON TABLE {self.new} IS '{UNFINISHED}'")

    def _copy(self, types: dict[str, str], batches: Iterator[pa.RecordBatch]) -> None:
        statement = f"COPY {self.new} ({_list(list(types))}) FROM STDIN WITH (FORMAT BINARY)".replace("%%", "%")
        with self.database.connection.cursor().copy(sql.SQL(statement)) as copy:
            copy.set_types([kind.partition("(")[0] for kind in types.values()])
            for batch in batches:
                table = pa.Table.from_batches([batch])
                for row in zip(*(sql_values(table[name], kind) for name, kind in types.items()), strict=True):
                    copy.write_row(row)

    def _index(self, index: dict[str, Any], types: dict[str, str]) -> None:
        """Index the columns and the embeddings of the new table."""
        for column in sorted(set(types) - UNINDEXED):
            try:
                self._execute(f"CREATE INDEX ON {self.new} ({_quoted(column)})")
            except errors.ProgramLimitExceeded:
                logger.info("the column %s gets no index: its values are too long.", column)
        if index["type"] == "hnsw":
            logger.info("indexing the embeddings.")
            operators = f"{types[VECTOR].partition('(')[0]}_cosine_ops"
            options = f"WITH (m='{index['m']}', ef_construction='{index['ef_construction']}')"
            self._execute(f"CREATE INDEX ON {self.new} USING hnsw ({VECTOR} {operators}) {options}")

    def _swap(self, manifest: IndexManifest) -> None:
        """Put the new table in the place of the old one, with its rights, and the manifest too."""
        rights = (
            "SELECT privilege_type, is_grantable, CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END "
            "FROM pg_class, aclexplode(relacl) WHERE oid = to_regclass(%s) AND grantee <> relowner"
        )
        with self.database.connection.transaction():
            for right, may_grant, user in self._query(rights, self.table):
                option = " WITH GRANT OPTION" if may_grant else ""
                self._execute(f"GRANT {right} ON {self.new} TO {user}{option}".replace("%", "%%"))
            self._execute(f"DROP TABLE IF EXISTS {self.table}")
            self._execute(f"ALTER TABLE {self.new} RENAME TO {_quoted(self.name)}")
            self._execute(f"COMMENT ON TABLE {self.table} IS '{MARK}'")
            self._execute(f"DELETE FROM {self.state}")
            self._execute(f"INSERT INTO {self.state} VALUES (%s)", [json.dumps(asdict(manifest))])

    def search(self, queries: np.ndarray, k: int, where: str | None = None) -> list[pa.Table]:
        with self._reading() as types:
            condition, values = self._condition(where, types)
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
    def _reading(self) -> Iterator[dict[str, str]]:
        """Begin a transaction that cannot write; yield the types of the columns."""
        assert self._opened is not None
        with self.database.readable(), self.database.snapshot():
            # The rows of the table have to be those of the manifest that is read next.
            self._execute(f"LOCK TABLE {self.table} IN ACCESS SHARE MODE")
            self._opened = self._opened.require_successor(self.location, self._manifest())
            yield self._opened.stored["columns"]

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

    def _manifest(self) -> IndexManifest | None:
        if self._comment(f"{self.name}_llm2clip") != MARK:
            return None
        stored = self._execute(f"SELECT manifest FROM {self.state}").fetchone()
        return None if stored is None else IndexManifest.from_fields(self.location, stored[0])


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
