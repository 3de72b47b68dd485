"""The rows of an index in one version of a LanceDB table: reading, and searching."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llm2clip.search.faiss_vectors import read_faiss, search_faiss
from llm2clip.search.held_rows import HeldRows, remember
from llm2clip.search.index_manifest import REBUILD, IndexManifest
from llm2clip.search.index_rows import INTERNAL, NUMBER, VECTOR, Found
from llm2clip.utils.library_errors import SYSTEM
from llm2clip.utils.remote_path import AnyPath, RemotePath, local_copy, wrap_connection_errors

SCAN_ROWS = 8192
# Rows that fulfil a condition, up to which comparing all of them costs less than looking through cells.
EXACT_MATCHES = 4_000
# With fewer rows that fulfil a condition, more cells are searched, since each holds fewer of them.
MATCHES_FOR_PROBES = 40_000
DISTANCE = "_distance"
# How LanceDB says that the system could not write a file.
DISK = re.compile(r"LanceError\(IO\)|\(os error \d+\)")
# How it says that a condition has no value for some row, such as 1 / 0; the row itself has been read.
NO_VALUE = re.compile(r".*Error applying filter expression to batch: ", re.DOTALL)
# Where in its source an error was raised.
ORIGIN = re.compile(r",? /\S+\.rs:\d+:\d+")


class LanceRows:
    """The rows of one version of a table; see [`IndexRows`].

    Args:
        folder: Folder of the index, local or remote.
        table: An open table. It is pinned to its version by whoever opens it.
    """

    def __init__(self, folder: AnyPath, table: Any, manifest: IndexManifest) -> None:
        self.folder = folder
        self.table = table
        self.manifest = manifest
        self._counted: dict[str, int] = {}
        self._held = HeldRows(self._read_embeds)

    def count(self, where: str | None = None) -> int:
        with self._readable(where):
            return int(self.table.count_rows(_condition(where)))

    def scan(self, columns: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        with self._readable(where):
            query = self.table.search().select(list(columns)).with_row_id(True)
            query = query.where(_condition(where)) if where else query
            yield from query.to_batches(batch_size=SCAN_ROWS)

    def take(self, numbers: np.ndarray, columns: Sequence[str]) -> pa.Table:
        wanted, places = np.unique(numbers, return_inverse=True)
        with self._readable():
            query = self.table.take_row_ids(wanted.tolist()).select(list(columns)).with_row_id()
            found = query.to_arrow()
        order = np.argsort(found[NUMBER].to_numpy())
        return found.take(pa.array(order[places])).drop_columns([NUMBER])

    def search(self, queries: np.ndarray, top: int, where: str | None = None) -> Found:
        matches = self._matches(where) if where else self.manifest.images
        if not matches:
            return [[] for _ in queries]
        top = min(top, matches)
        if self.manifest.index["type"] == "faiss":
            return self._search_faiss(queries, top, where)
        if where and (found := self._held.search(queries, top, where, matches)):
            return self._describe(*found)
        with self._readable(where):
            return [self._nearest(query, top, where, matches) for query in queries]

    def _matches(self, where: str) -> int:
        """Count as `count` does, once for each condition: these rows do not change."""
        if where not in self._counted:
            remember(self._counted, where, self.count(where))
        return self._counted[where]

    def _nearest(self, query: np.ndarray, top: int, where: str | None, matches: int) -> list[tuple[float, Any]]:
        search = self.table.search(np.asarray(query, dtype=np.float32), vector_column_name=VECTOR)
        search = search.distance_type("cosine").limit(top).select([*self.columns, DISTANCE])
        search = search.where(_condition(where), prefilter=True) if where else search
        index = self.manifest.index
        if index["type"] == "flat" or matches <= EXACT_MATCHES:
            search = search.bypass_vector_index()
        else:
            probes = index["probes"] * max(1, MATCHES_FOR_PROBES // matches)
            search = search.nprobes(probes).refine_factor(index["refine"])
        return [(1 - row.pop(DISTANCE), row) for row in search.to_arrow().to_pylist()]

    def _search_faiss(self, queries: np.ndarray, top: int, where: str | None) -> Found:
        allowed = None
        if where:
            numbers = [batch[NUMBER].to_numpy() for batch in self.scan([], where)]
            allowed = np.isin(self._numbers, np.concatenate(numbers))
        scores, places = search_faiss(self._faiss, queries, top, allowed)
        if ((places < -1) | (places >= len(self._numbers))).any():
            raise ValueError(
                f"the index {self.folder} is damaged: its faiss index has rows that do not exist; {REBUILD}"
            )
        return self._describe(scores, np.where(places < 0, -1, self._numbers[places]))

    def _describe(self, scores: np.ndarray, numbers: np.ndarray) -> Found:
        """Return scores with the rows of these numbers, both `(q, top)`; -1 is no row."""
        wanted = numbers[numbers >= 0]
        rows = iter(self.take(wanted, self.columns).to_pylist() if len(wanted) else [])
        return [
            [(float(score), next(rows)) for score, number in zip(*found, strict=True) if number >= 0]
            for found in zip(scores, numbers, strict=True)
        ]

    def _read_embeds(self, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers `(n,)` and embeddings `(n, width)` of the rows that fulfil a condition."""
        batches = list(self.scan([VECTOR], where))
        numbers = np.concatenate([batch[NUMBER].to_numpy() for batch in batches]).astype(np.int64)
        embeds = np.concatenate([batch[VECTOR].flatten().to_numpy() for batch in batches])
        return numbers, embeds.reshape(len(numbers), self.manifest.width)

    @cached_property
    def _faiss(self) -> Any:
        try:
            with local_copy(self.folder / self.manifest.stored["faiss"]) as file:
                built = read_faiss(file)
            if built.ntotal != self.manifest.images:
                raise ValueError(f"its faiss index has {built.ntotal} images, its manifest {self.manifest.images}")
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"the index {self.folder} is damaged: {error}; {REBUILD}") from error
        return built

    @cached_property
    def _numbers(self) -> np.ndarray:
        """Row numbers in the order of the table, which is that of the faiss index."""
        return np.concatenate([batch[NUMBER].to_numpy() for batch in self.scan([])]).astype(np.int64)

    @cached_property
    def columns(self) -> list[str]:
        """The columns that describe a row."""
        return [name for name in self.table.schema.names if name not in INTERNAL]

    @contextlib.contextmanager
    def _readable(self, where: str | None = None) -> Iterator[None]:
        """Turn the errors of LanceDB into those of [`IndexRows`]."""
        try:
            yield
        except Exception as error:
            if not is_of_lance(error):
                raise
            if where and (NO_VALUE.match(str(error)) or not self._is_condition(error, where)):
                raise ValueError(
                    f"where is {where!r}, which is no condition on the columns {', '.join(self.columns)}: "
                    f"{_reason(error)}"
                ) from error
            raise unreadable(self.folder, error) from error

    def _is_condition(self, error: Exception, where: str) -> bool:
        """Tell whether a condition can be planned, which reads no rows. LanceDB blames it for damaged files too."""
        if not isinstance(error, ValueError):
            return True
        try:
            self.table.search().where(_condition(where)).explain_plan()
        except Exception as fault:
            if not is_of_lance(fault):
                raise
            return False
        return True


def _condition(where: str | None) -> str | None:
    """Put a condition into parentheses: without them, LanceDB ignores what follows it, such as `LIMIT 1`."""
    return f"({where})" if where else None


def is_of_lance(error: Exception) -> bool:
    """Tell whether LanceDB raises such errors; of damaged files its panic too, whose class cannot be imported."""
    return isinstance(error, (RuntimeError, OSError, ValueError)) or type(error).__name__ == "RustPanic"


def unreadable(folder: AnyPath, error: Exception) -> Exception:
    """Return what to raise for an error of LanceDB: ValueError; of a URL ConnectionError, which it may be."""
    if isinstance(folder, RemotePath):
        return ConnectionError(
            f"the index {folder} cannot be read ({_reason(error)}). If that is no matter of the connection, it is "
            "damaged: delete it and build it again."
        )
    return ValueError(f"the index {folder} is damaged ({_reason(error)}); {REBUILD}")


@contextlib.contextmanager
def writing(folder: AnyPath) -> Iterator[None]:
    """Turn the errors of LanceDB when it writes: those of a disk into OSError, those of a URL into ConnectionError."""
    with wrap_connection_errors(folder):
        try:
            yield
        except (RuntimeError, OSError) as error:
            if not isinstance(folder, Path) or not DISK.search(str(error)):
                raise
            raise OSError(
                f"the index {folder} cannot be written ({_disk_reason(error)}); what it had stays. When the disk is "
                "well, run the same llm2clip index again."
            ) from error


def _disk_reason(error: Exception) -> str:
    found = SYSTEM.findall(str(error))
    return found[-1] if found else _reason(error)


def _reason(error: Exception) -> str:
    """Return the first line of a message of LanceDB; the rest is where in its source."""
    text = ORIGIN.sub("", NO_VALUE.sub("", str(error)))
    return text.splitlines()[0] if text else type(error).__name__
