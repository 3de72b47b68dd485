"""An index in PostgreSQL: a table of rows with pgvector, a table of its manifest, and one of what a run writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from psycopg import errors, sql

from llm2clip.search.index_manifest import REBUILD, IndexManifest
from llm2clip.search.index_rows import NUMBER
from llm2clip.search.postgres_database import PostgresDatabase, set_session
from llm2clip.search.postgres_rows import PostgresRows, sql_type
from llm2clip.search.postgres_writing import COMPLETE, UNFINISHED, WrittenTable
from llm2clip.utils.locks import PATIENCE

logger = logging.getLogger(__name__)

SCHEMA = "llm2clip"
# Letters that need no quotes in SQL; PostgreSQL cuts names after 63.
TABLE_NAME = re.compile(r"(?:([a-z_][a-z0-9_]{0,62})\.)?([a-z_][a-z0-9_]{0,47})")
STATE_COLUMNS = "(state text PRIMARY KEY, is_whole boolean, manifest json, failures json)"
# A run is silent while it embeds, and an index of many embeddings takes hours.
UNLIMITED = {"statement_timeout": "0", "idle_session_timeout": "0"}
# The comment on each of our tables, by which they are known.
MARK = "written by llm2clip index"


class PostgresStore:
    """The index in three tables of a database; see [`IndexStore`].

    `NAME` has the rows of the complete index. `NAME_llm2clip` has its manifest, and that of an unfinished run.
    `NAME_unfinished` has the rows that a run adds, or all rows of an index that is built from scratch.

    Args:
        url: See [`PostgresDatabase`].
        table: `NAME`, in the schema `llm2clip`, or `SCHEMA.NAME`.
    """

    index_types: tuple[str, ...] = ("flat", "hnsw")

    def __init__(self, url: str, table: str) -> None:
        self.database = PostgresDatabase(url)
        self.schema, self.name = split_name(table)
        self.place = f"{self.schema}.{self.name} in {self.database.name}"
        self.table = self._identifier()
        self.staging = self._identifier("_unfinished")
        self.state = self._identifier("_llm2clip")

    def require_own(self) -> None:
        with self.database.readable():
            for name in self._names():
                if self._exists(name) and not self._is_own(name):
                    raise FileExistsError(
                        f"the table {self.schema}.{name} in {self.database.name} is not replaced, because llm2clip "
                        "index did not write it; choose another --table, or drop it yourself."
                    )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        digest = hashlib.blake2b(f"{self.schema}.{self.name}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "big", signed=True)
        with self.database.readable():
            connection = self.database.connection
            set_session(connection, {"lock_timeout": f"{PATIENCE:.0f}s", **UNLIMITED})
            try:
                # A killed run keeps its lock until its worker processes have noticed, after a few seconds.
                connection.execute("SELECT pg_advisory_lock(%s::bigint)", (key,))
            except errors.LockNotAvailable:
                self.database.close()
                raise ValueError(f"another run is writing {self.place}; wait until it has ended.") from None
        try:
            yield
        finally:
            self.database.close()  # with the lock, in whichever state an error has left the connection

    def manifest(self) -> IndexManifest | None:
        fields = self._read_state(COMPLETE, "manifest")
        return None if fields is None else IndexManifest.from_fields(self.place, fields)

    def require_manifest(self) -> IndexManifest:
        with self.database.readable():
            manifest = self.manifest()
            if manifest is None:
                is_begun = self._is_own(self.name + "_unfinished")
                state = "is not finished; run the same llm2clip index again" if is_begun else "does not exist"
                raise FileNotFoundError(
                    f"there is no index {self.place}: it {state}. To create one: llm2clip index FOLDER --model MODEL "
                    f"--postgres URL --table {self.schema}.{self.name}"
                )
        return manifest

    def failures(self) -> list[dict[str, Any]] | None:
        found = self._read_state(COMPLETE, "failures")
        return found if isinstance(found, list) else None

    def rows(self, manifest: IndexManifest) -> PostgresRows:
        with self.database.readable():
            self._require_columns(manifest)
        return PostgresRows(self, manifest)

    def unfinished(self) -> tuple[IndexManifest, WrittenTable] | None:
        unfinished = self._read_state(UNFINISHED, "manifest")
        if unfinished is not None:
            manifest = IndexManifest.from_fields(self.place, unfinished, is_unfinished=True)
            is_whole = bool(self._read_state(UNFINISHED, "is_whole"))
            return manifest, WrittenTable(self, manifest, is_whole)
        complete = self.manifest()
        if complete is None:
            return None
        self._require_columns(complete)
        return complete, WrittenTable(self, complete, is_whole=False)

    def create(self, manifest: IndexManifest, schema: pa.Schema) -> WrittenTable:
        manifest.stored = {"columns": {name: sql_type(schema.field(name).type) for name in schema.names}}
        with self.database.readable(), self.database.connection.transaction():
            if not self._query("SELECT FROM pg_namespace WHERE nspname = %s", self.schema):
                self.execute("CREATE SCHEMA {}", sql.Identifier(self.schema))
            if not self._exists(self.name + "_llm2clip"):
                self.execute(
                    f"CREATE TABLE {{}} {STATE_COLUMNS}",
                    self.state,
                )
                self.mark(self.state)
            self.begin(manifest, is_whole=True)
        return WrittenTable(self, manifest, is_whole=True)

    def revert(self) -> WrittenTable:
        manifest = self.manifest()
        assert manifest is not None
        with self.database.readable(), self.database.connection.transaction():
            self.drop_unfinished()
        return WrittenTable(self, manifest, is_whole=False)

    def remove_empty(self) -> None:
        # What a lost connection leaves is found by the next run.
        with contextlib.suppress(ValueError, OSError), self.database.readable():
            if self.manifest() is not None:
                return
            found = self.unfinished()
            if found is not None and not found[1].count():
                with self.database.connection.transaction():
                    self.drop_unfinished()
                    self.execute("DROP TABLE {}", self.state)

    def begin(self, manifest: IndexManifest, is_whole: bool) -> None:
        """Create an empty table of unfinished rows; for use in a transaction."""
        self.drop_unfinished()
        columns = [
            sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind))  # of our table of types
            for name, kind in manifest.stored["columns"].items()
        ]
        number = sql.SQL("{} bigint PRIMARY KEY").format(sql.Identifier(NUMBER))
        self.execute("CREATE TABLE {} ({})", self.staging, sql.SQL(", ").join([number, *columns]))
        self.mark(self.staging)
        self.write_state(UNFINISHED, manifest, None, is_whole)

    def drop_unfinished(self) -> None:
        """Drop the unfinished rows and their manifest; for use in a transaction."""
        self.execute("DROP TABLE IF EXISTS {}", self.staging)
        self.execute("DELETE FROM {} WHERE state = {}", self.state, sql.Literal(UNFINISHED))

    def write_state(
        self, state: str, manifest: IndexManifest, failures: list[dict[str, Any]] | None, is_whole: bool = True
    ) -> None:
        """Write the manifest of the complete index or of the unfinished run; for use in a transaction."""
        self.execute("DELETE FROM {} WHERE state = {}", self.state, sql.Literal(state))
        statement = sql.SQL("INSERT INTO {} VALUES (%s, %s, %s, %s)").format(self.state)
        values = (state, is_whole, json.dumps(manifest.as_fields()), json.dumps(failures))
        self.database.connection.execute(statement, values)

    def replace_table(self) -> None:
        """Put the table of unfinished rows in the place of that of the complete index; for use in a transaction."""
        for role, right in self._grants():
            to = sql.Identifier(role) if role else sql.SQL("PUBLIC")
            self.execute(f"GRANT {right} ON {{}} TO {{}}", self.staging, to)
        self.execute("DROP TABLE IF EXISTS {}", self.table)
        names = [name for name, _ in self.indexes()]
        self.execute("ALTER TABLE {} RENAME TO {}", self.staging, sql.Identifier(self.name))
        for name in names:
            new = name.replace(f"{self.name}_unfinished", self.name)
            if new != name:
                self.execute("ALTER INDEX {} RENAME TO {}", sql.Identifier(self.schema, name), sql.Identifier(new))
        self.execute("DELETE FROM {} WHERE state = {}", self.state, sql.Literal(UNFINISHED))

    def indexes(self) -> list[tuple[str, bool]]:
        """Return the names of the indexes of the unfinished rows, and whether each is that of the primary key."""
        query = (
            "SELECT i.relname, indisprimary FROM pg_index JOIN pg_class i ON i.oid = indexrelid JOIN pg_class t ON "
            "t.oid = indrelid JOIN pg_namespace n ON n.oid = t.relnamespace WHERE nspname = %s AND t.relname = %s"
        )
        return self._query(query, self.schema, self.name + "_unfinished")

    def _grants(self) -> list[tuple[str | None, str]]:
        """Return who else has which right on the complete rows; None for everyone."""
        query = (
            "SELECT nullif(pg_get_userbyid(grantee), 'unknown (OID=0)'), privilege_type FROM pg_class c JOIN "
            "pg_namespace n ON n.oid = relnamespace CROSS JOIN aclexplode(relacl) WHERE nspname = %s AND relname = %s "
            "AND grantee <> relowner"
        )
        return self._query(query, self.schema, self.name)

    def execute(self, statement: str, *parts: sql.Composable) -> None:
        """Run a statement without parameters."""
        self.database.connection.execute(sql.SQL(statement).format(*parts))

    def mark(self, table: sql.Identifier) -> None:
        """Write on a table that it is ours."""
        self.execute("COMMENT ON TABLE {} IS {}", table, sql.Literal(MARK))

    def has_unfinished(self) -> bool:
        """Return whether there is a table of unfinished rows."""
        return self._exists(self.name + "_unfinished")

    def _identifier(self, suffix: str = "") -> sql.Identifier:
        return sql.Identifier(self.schema, self.name + suffix)

    def _names(self) -> list[str]:
        return [self.name, self.name + "_unfinished", self.name + "_llm2clip"]

    def _query(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.database.connection.execute(query, values).fetchall()

    def _exists(self, name: str) -> bool:
        query = (
            "SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = %s AND relname = %s"
        )
        return bool(self._query(query, self.schema, name))

    def _is_own(self, name: str) -> bool:
        query = "SELECT obj_description(c.oid, 'pg_class') FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace"
        found = self._query(f"{query} WHERE nspname = %s AND relname = %s AND relkind = 'r'", self.schema, name)
        return found == [(MARK,)]

    def _read_state(self, state: str, column: str) -> Any:
        with self.database.readable():
            if not self._is_own(self.name + "_llm2clip"):
                return None
            query = sql.SQL("SELECT {} FROM {} WHERE state = %s").format(sql.Identifier(column), self.state)
            found = self.database.connection.execute(query, (state,)).fetchone()
        return None if found is None else found[0]

    def _require_columns(self, manifest: IndexManifest) -> None:
        """Raise ValueError unless the table has the columns that the manifest names, with their types."""
        query = (
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute JOIN pg_class c ON c.oid = attrelid "
            "JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = %s AND relname = %s AND attnum > 0"
        )
        have = dict(self._query(query, self.schema, self.name))
        for name, kind in {NUMBER: "bigint", **manifest.stored["columns"]}.items():
            if have.get(name) != kind:
                found = f"has the type {have[name]}" if name in have else "is missing"
                raise ValueError(f"the index {self.place} is damaged: its column {name} of {kind} {found}; {REBUILD}")


def split_name(table: str) -> tuple[str, str]:
    """Return schema and name of a table; raise ValueError if it is not a plain name."""
    found = TABLE_NAME.fullmatch(table)
    if found is None:
        raise ValueError(
            f"table is {table!r}, but it has to be NAME or SCHEMA.NAME, of lower-case letters, digits and _, and NAME "
            "of at most 48; the schema is llm2clip if it is left out."
        )
    return found[1] or SCHEMA, found[2]
