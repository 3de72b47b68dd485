"""The rows that a run writes into PostgreSQL, and the transaction that lets searches see them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from psycopg import errors, sql

from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.index_rows import NUMBER, REASON, VECTOR
from llm2clip.search.postgres_rows import TableReader, names, sql_values

if TYPE_CHECKING:
    from llm2clip.search.postgres_store import PostgresStore

logger = logging.getLogger(__name__)

# Columns that conditions rarely name; the others get an index.
UNINDEXED = {"caption", "hash", "mtime_ns", "row", "size"}
# States of a manifest.
COMPLETE, UNFINISHED = "complete", "unfinished"
# A graph is built anew, in parallel, where more than this share of its rows would be added or deleted one by one.
REBUILD_SHARE = 0.5
# Seconds to wait for searches that are under way, and how often: new ones have to wait as long.
SWAP_PATIENCE = "5s"
SWAP_TRIES = 12


class WrittenTable(TableReader):
    """The rows of the complete index and those that a run has added, without those that it has deleted.

    Args:
        manifest: That with which the run began.
        is_whole: Whether the unfinished rows are a new index, of which the complete one is no part.
    """

    def __init__(self, store: PostgresStore, manifest: IndexManifest, is_whole: bool) -> None:
        super().__init__(store.database, manifest.stored["columns"])
        self.store = store
        self.manifest = manifest
        self.is_whole = is_whole
        with self.database.readable():
            self._has_staging = store.has_unfinished()
            self._last_published = -1 if is_whole else self._last(store.table)
            staged = self._last(store.staging) if self._has_staging else -1
        self._next = max(self._last_published, staged) + 1
        self._deleted = np.empty(0, np.int64)

    def _last(self, table: sql.Identifier) -> int:
        query = sql.SQL("SELECT coalesce(max({}), -1) FROM {}").format(sql.Identifier(NUMBER), table)
        return int(self.database.connection.execute(query).fetchone()[0])  # type: ignore[index]

    def _source(self) -> sql.Composable:
        if self.is_whole:
            return self.store.staging
        parts = [self._base()]
        if self._has_staging:
            parts.append(sql.SQL("SELECT {} FROM {}").format(names([NUMBER, *self.types]), self.store.staging))
        return sql.SQL("({}) AS rows").format(sql.SQL(" UNION ALL ").join(parts))

    def _base(self) -> sql.Composed:
        """Return the query for the rows of the complete index that stay."""
        query = sql.SQL("SELECT {} FROM {}").format(names([NUMBER, *self.types]), self.store.table)
        if len(self._deleted):
            gone = sql.SQL(" WHERE NOT EXISTS (SELECT FROM unnest(%(deleted)s::bigint[]) AS gone WHERE gone = {})")
            query += gone.format(sql.Identifier(NUMBER))
        return query

    def _parameters(self) -> dict[str, Any]:
        return {"deleted": self._deleted.tolist()} if len(self._deleted) else {}

    @property
    def is_published(self) -> bool:
        return not self.is_whole and not len(self._deleted) and not self._count_staged()

    def _count_staged(self) -> int:
        if not self._has_staging:
            return 0
        query = sql.SQL("SELECT count(*) FROM {}").format(self.store.staging)
        with self.database.readable():
            return int(self.database.connection.execute(query).fetchone()[0])  # type: ignore[index]

    def append(self, rows: pa.Table) -> None:
        columns = [NUMBER, *self.types]
        values = [sql_values(rows[name], kind) for name, kind in self.types.items()]
        with self.database.readable(), self.database.connection.transaction():
            self._require_staging()
            statement = sql.SQL("COPY {} ({}) FROM STDIN WITH (FORMAT BINARY)").format(
                self.store.staging, names(columns)
            )
            with self.database.connection.cursor().copy(statement) as copy:
                copy.set_types(["bigint", *(kind.partition("(")[0] for kind in self.types.values())])
                for number, row in enumerate(zip(*values, strict=True), self._next):
                    copy.write_row((number, *row))
        self._has_staging = True
        self._next += len(rows)

    def _require_staging(self) -> None:
        if not self._has_staging:
            self.store.begin(self.manifest, is_whole=False)

    def delete(self, numbers: np.ndarray) -> None:
        # Those of the complete index are deleted when this one is published.
        self._deleted = np.union1d(self._deleted, numbers[numbers <= self._last_published])
        staged = numbers[numbers > self._last_published]
        if len(staged):
            with self.database.readable():
                self._delete_from(self.store.staging, staged)

    def _delete_from(self, table: sql.Identifier, numbers: np.ndarray) -> None:
        statement = sql.SQL("DELETE FROM {} WHERE {} = ANY(%s)").format(table, sql.Identifier(NUMBER))
        self.database.connection.execute(statement, (numbers.tolist(),))

    def publish(self, manifest: IndexManifest, failures: list[dict[str, Any]]) -> None:
        manifest.stored = {"columns": self.types}
        with self.database.readable():
            version = self.database.connection.info.parameter_status("server_version")
            manifest.record_versions(postgresql=str(version))
            if self._has_staging:
                self.store.execute(f"DELETE FROM {{}} WHERE {REASON} IS NOT NULL", self.store.staging)
            if not self.is_whole and self._has_to_rebuild(manifest):
                self._make_whole()
            if self.is_whole:
                self._index(manifest.index)
                self._swap(manifest, failures)
            else:
                self._merge(manifest, failures)

    def _has_to_rebuild(self, manifest: IndexManifest) -> bool:
        """Return whether to write all rows into a new table rather than to change the old one."""
        complete = self.store.manifest()
        if complete is None or _built(complete.index) != _built(manifest.index):
            return True
        changes = self._count_staged() + len(self._deleted)
        return manifest.index["type"] != "flat" and changes > REBUILD_SHARE * complete.images

    def _make_whole(self) -> None:
        """Copy the rows of the complete index, so that the unfinished rows are all rows."""
        columns = names([NUMBER, *self.types])
        with self.database.connection.transaction():
            self._require_staging()
            statement = sql.SQL("INSERT INTO {} ({}) {}").format(self.store.staging, columns, self._base())
            self.database.connection.execute(statement, self._parameters())
            self.store.execute("UPDATE {} SET is_whole = true", self.store.state)
        self.is_whole, self._has_staging = True, True
        self._last_published, self._deleted = -1, np.empty(0, np.int64)

    def _index(self, index: dict[str, Any]) -> None:
        """Index the unfinished rows; what a killed run has built is built again, since rows may have come since."""
        for name, is_primary in self.store.indexes():
            if not is_primary:
                self.store.execute("DROP INDEX {}", sql.Identifier(self.store.schema, name))
        for column in set(self.columns) - UNINDEXED:
            try:
                self.store.execute("CREATE INDEX ON {} ({})", self.store.staging, sql.Identifier(column))
            except errors.ProgramLimitExceeded:
                logger.info("the column %s gets no index: its values are too long.", column)
        if index["type"] == "hnsw":
            logger.info("indexing %d embeddings.", self._count_staged())
            classes = f"{self.types[VECTOR].partition('(')[0]}_ip_ops"
            build = f"WITH (m = {index['m']}, ef_construction = {index['ef_construction']})"
            statement = f"CREATE INDEX ON {{}} USING hnsw ({{}} {classes}) {build}"
            self.store.execute(statement, self.store.staging, sql.Identifier(VECTOR))
        self.store.execute("ANALYZE {}", self.store.staging)

    def _swap(self, manifest: IndexManifest, failures: list[dict[str, Any]]) -> None:
        """Put the unfinished rows in the place of the complete index."""
        for _ in range(SWAP_TRIES):
            try:
                with self.database.connection.transaction():
                    self.store.execute(f"SET LOCAL lock_timeout = '{SWAP_PATIENCE}'")
                    self.store.replace_table()
                    self.store.write_state(COMPLETE, manifest, failures)
                return
            except errors.LockNotAvailable:
                logger.warning("waiting for a search that has %s open.", self.store.place)
        raise ValueError(
            f"{self.store.place} is not replaced, because another session keeps it open (pg_locks shows which); the "
            "new index is kept: end that session, and run the same command again."
        )

    def _merge(self, manifest: IndexManifest, failures: list[dict[str, Any]]) -> None:
        """Add the unfinished rows to the complete index, and delete from it."""
        columns = names([NUMBER, *self.types])
        with self.database.connection.transaction():
            if len(self._deleted):
                self._delete_from(self.store.table, self._deleted)
            if self._has_staging:
                insert = "INSERT INTO {} ({}) SELECT {} FROM {} ORDER BY {}"
                number = sql.Identifier(NUMBER)
                self.store.execute(insert, self.store.table, columns, columns, self.store.staging, number)
            self.store.drop_unfinished()
            self.store.write_state(COMPLETE, manifest, failures)
        self.store.execute("ANALYZE {}", self.store.table)


def _built(index: dict[str, Any]) -> dict[str, Any]:
    """Return what an index was built with: all but the parameters of a search."""
    return {name: value for name, value in index.items() if name != "ef_search"}
