"""The rows of an index in one version of a LanceDB table: reading, searching, and errors of LanceDB."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from llm2clip.files.library_errors import SYSTEM
from llm2clip.files.remote_path import AnyPath, RemotePath
from llm2clip.search.index_manifest import REPAIR, IndexManifest
from llm2clip.search.store import INTERNAL, MORE, VECTOR
from llm2clip.search.top_k import top_k
from llm2clip.search.where import Conditions, parse_where

# What LanceDB calls the distance to a query, and the number of a row.
DISTANCE, NUMBER = "_distance", "_rowid"
SCAN_ROWS = 8192
# Rows that fulfil a condition, up to which comparing all of them costs less than looking through cells.
EXACT_MATCHES = 1_000
# With fewer rows that fulfil a condition, more cells are searched, since each holds fewer of them.
MATCHES_FOR_PROBES = 40_000
# Where in the source of LanceDB an error was raised.
ORIGIN = re.compile(r",? /\S+\.rs:\d+:\d+")
# How LanceDB says that the system could not write a file.
DISK = re.compile(r"LanceError\(IO\)|\(os error \d+\)")
# The only whole number that its parser takes for another.
MIN_INT64 = -(2**63)
UNITS = {"s": "Second", "ms": "Millisecond", "us": "Microsecond", "ns": "Nanosecond"}


class LanceRows:
    """The rows of an open table.

    Args:
        folder: Folder of the index, local or remote.
        table: The table.
        manifest: That of the index.
    """

    def __init__(self, folder: AnyPath, table: Any, manifest: IndexManifest) -> None:
        self.folder, self.table, self.manifest = folder, table, manifest
        self.columns = [name for name in table.schema.names if name not in INTERNAL]
        self._count = lru_cache(maxsize=1000)(table.count_rows)

    def scan(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        """Read columns of rows in batches, in order, with the numbers of the rows as `NUMBER`."""
        condition = self._condition(where)
        with readable(self.folder):
            query = self.table.search().select(list(columns)).with_row_id(True)
            yield from (query.where(condition) if condition else query).to_batches(batch_size=SCAN_ROWS)

    def take(self, numbers: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Read the rows with these numbers, in their order and as often as they are there."""
        with readable(self.folder):
            query = self.table.take_row_ids(np.unique(numbers).tolist()).select(list(columns))
            rows = query.with_row_id().to_arrow()
        have = rows[NUMBER].to_numpy()
        order = np.argsort(have)
        return rows.take(pa.array(order[np.searchsorted(have, numbers, sorter=order)])).drop_columns([NUMBER])

    def search(self, queries: np.ndarray, k: int, where: str | None = None) -> list[pa.Table]:
        """Find the nearest rows; see `IndexStore.search`."""
        condition = self._condition(where)
        matches = self._matches(where, condition) if condition else self.manifest.images
        with readable(self.folder):
            k = min(k, matches)
            if not matches:
                return [self.table.schema.empty_table().select([*self.columns, VECTOR]) for _ in queries]
            index = self.manifest.index
            is_exact = index["type"] == "flat" or matches <= EXACT_MATCHES
            if is_exact and len(queries) > 1:
                return self._nearest_of_many(queries, k + MORE, where)
            probes = None if is_exact else index["probes"] * max(1, MATCHES_FOR_PROBES // matches)
            return [self._nearest(query, k, condition, probes) for query in queries]

    def _matches(self, where: str | None, condition: str) -> int:
        """Count the rows that fulfil a condition; ValueError if LanceDB does not take it, which is no damage."""
        try:
            with readable(self.folder):
                return self._count(condition)
        except (ValueError, ConnectionError):
            try:
                self.table.search().where(condition).explain_plan()  # reads no rows
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"where is {where!r}, which LanceDB does not take: {_reason(error)}") from error
            raise

    def _nearest_of_many(self, queries: np.ndarray, k: int, where: str | None) -> list[pa.Table]:
        """Compare all rows with all queries, a block at a time; LanceDB would read them for each query."""
        best, numbers = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        for batch in self.scan([VECTOR], where):
            embeds = batch[VECTOR].flatten().to_numpy().astype(np.float32).reshape(len(batch), -1)
            units = torch.nn.functional.normalize(torch.from_numpy(embeds))  # of 16 bits, not quite
            scores, rows = top_k(torch.from_numpy(queries), units, k)
            found = torch.from_numpy(batch[NUMBER].to_numpy().astype(np.int64))[rows]
            best, order = torch.cat([best, scores], dim=1).topk(min(k, best.shape[1] + scores.shape[1]), dim=1)
            numbers = torch.cat([numbers, found], dim=1).gather(1, order)
        rows_of_all = self.take(numbers.flatten().numpy(), [*self.columns, VECTOR])
        return [rows_of_all.slice(start, numbers.shape[1]) for start in range(0, numbers.numel(), numbers.shape[1])]

    def _nearest(self, query: np.ndarray, k: int, condition: str | None, probes: int | None) -> pa.Table:
        """Search so many cells, or compare all rows."""
        search = self.table.search(np.asarray(query, dtype=np.float32), vector_column_name=VECTOR)
        search = search.distance_type("cosine").select([*self.columns, VECTOR, DISTANCE])
        search = search.where(condition, prefilter=True) if condition else search
        if probes is None:
            search = search.bypass_vector_index().limit(k + MORE)
        else:
            search = search.nprobes(probes).refine_factor(self.manifest.index["refine"]).limit(k)
        return search.to_arrow().drop_columns([DISTANCE])

    def _condition(self, where: str | None) -> str | None:
        columns = {name: self.table.schema.field(name).type for name in self.columns}
        return None if where is None else parse_where(where, columns, LanceConditions())


@contextlib.contextmanager
def wrap_connection_errors(path: AnyPath) -> Iterator[None]:
    """Turn what libraries raise when the store of a remote path cannot be reached into ConnectionError.

    FileNotFoundError, NotADirectoryError and ValueError stay what they are.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, ConnectionError, ValueError):
        raise
    except Exception as error:
        # Each library has its own kinds.
        if isinstance(path, Path):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConnectionError(f"{path} cannot be reached: {reason}") from error


@contextlib.contextmanager
def readable(folder: AnyPath) -> Iterator[None]:
    """Turn errors of LanceDB into ValueError, since the index is damaged; of a URL into ConnectionError.

    Over damaged files it also panics, with a class that cannot be imported.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (RuntimeError, OSError, ValueError)) and type(error).__name__ != "RustPanic":
            raise
        if isinstance(folder, RemotePath):
            raise ConnectionError(
                f"the index {folder} cannot be read ({_reason(error)}). If that is no matter of the connection, it is "
                f"damaged: {REPAIR}"
            ) from error
        raise ValueError(f"the index {folder} is damaged ({_reason(error)}); {REPAIR}") from error


@contextlib.contextmanager
def writable(folder: AnyPath) -> Iterator[None]:
    """Turn errors of LanceDB when it writes: those of a disk into OSError, those of a URL into ConnectionError."""
    with wrap_connection_errors(folder):
        try:
            yield
        except (RuntimeError, OSError) as error:
            if not isinstance(folder, Path) or not DISK.search(str(error)):
                raise
            reasons = SYSTEM.findall(str(error)) or [_reason(error)]
            raise OSError(
                f"the index {folder} cannot be written ({reasons[-1]}); what it had stays. When the disk is well, run "
                "the same llm2clip index again."
            ) from error


def _reason(error: Exception) -> str:
    """Return the first line of a message of LanceDB; the rest is where in its source."""
    text = ORIGIN.sub("", str(error))
    return text.splitlines()[0] if text else type(error).__name__


class LanceConditions(Conditions):
    def column(self, name: str) -> str:
        return f"`{name.replace('`', '``')}`"

    def value(self, value: pa.Scalar) -> str:
        kind, content = value.type, value.as_py()
        if pa.types.is_timestamp(kind):
            zone = "None" if kind.tz is None else f'Some("{kind.tz}")'
            # In UTC, since old times of a zone have seconds in their offset.
            text = value.cast(pa.timestamp("us", kind.tz and "UTC")).as_py().isoformat()
            return f"arrow_cast('{text}', 'Timestamp({UNITS[kind.unit]}, {zone})')"
        if pa.types.is_date(kind):
            return f"date '{content}'"
        if isinstance(content, str):
            return "'" + content.replace("'", "''") + "'"
        if content == MIN_INT64:
            return f"arrow_cast('{MIN_INT64}', 'Int64')"
        return str(content).lower()

    def like(self, column: str, negation: str, pattern: str) -> str:
        escaped = pattern.replace("\\", "\\\\").replace("'", "''")
        return f"{self.column(column)} {negation}LIKE '{escaped}'"
