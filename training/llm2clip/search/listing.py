"""The list of what an index is of: the columns that describe each row, and the digest of its image or caption.

It is an Arrow file in the folder of the stored embeddings, and its name is that of its content. The table of an index
is made of both, without a model and without reading the images again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llm2clip.files.atomic import flush_file, flush_folder, sha256, temporary_name
from llm2clip.search.store import DIGEST

PATTERN = "listing-*.arrow"
ROWS_AT_ONCE = 4096
DECODING = b"decoding"


class Listing:
    """An open list.

    Args:
        path: The file.

    Attributes:
        decoding: What decided which images could be decoded by the run that wrote it.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It has changed since it was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.name != _name(path):
            raise ValueError(f"{path} has changed since it was written; the same llm2clip index writes it again.")
        self._file: Any = pa.ipc.open_file(pa.memory_map(str(path)))
        self.schema: pa.Schema = self._file.schema
        self.decoding: dict[str, Any] = json.loads((self.schema.metadata or {}).get(DECODING, "{}"))

    @classmethod
    def write(
        cls, folder: Path, tables: Iterator[pa.Table], columns: Mapping[str, pa.DataType], decoding: dict[str, Any]
    ) -> Listing:
        """Write a list into a folder, and open it.

        Args:
            tables: The rows, some at a time.
            columns: Their columns, with `DIGEST`.
            decoding: What decides which images can be decoded.
        """
        schema = pa.schema(list(columns.items()), {DECODING: json.dumps(decoding)})
        path = temporary_name(folder / "listing")
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        try:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema, options=options) as writer:
                for table in _of_equal_size(tables, schema):
                    writer.write_table(table)
            flush_file(path)
            named = folder / _name(path)
            if not named.is_file() or _name(named) != named.name:
                path.replace(named)
        finally:
            path.unlink(missing_ok=True)
        flush_folder(folder)
        return cls(named)

    @classmethod
    def read_all(cls, folder: Path) -> list[Listing]:
        """Open the lists in a folder, those of killed runs too; damaged ones are left out."""
        found = []
        for path in sorted(folder.glob(PATTERN)):
            try:
                found.append(cls(path))
            except (OSError, ValueError, pa.ArrowException):
                continue
        return found

    def __len__(self) -> int:
        count = self._file.num_record_batches
        return 0 if not count else (count - 1) * ROWS_AT_ONCE + self._file.get_batch(count - 1).num_rows

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Read all rows in order, `ROWS_AT_ONCE` at a time."""
        yield from map(self._file.get_batch, range(self._file.num_record_batches))

    def take(self, rows: np.ndarray) -> pa.Table:
        """Read the rows with these numbers, which ascend."""
        parts = [self.schema.empty_table()]
        for number in np.unique(rows // ROWS_AT_ONCE).tolist():
            chosen = rows[rows // ROWS_AT_ONCE == number] - number * ROWS_AT_ONCE
            parts.append(pa.Table.from_batches([self._file.get_batch(number).take(pa.array(chosen))]))
        return pa.concat_tables(parts)

    @cached_property
    def keys(self) -> np.ndarray:
        """The digests as keys of a [`Store`], `(rows, 2)` int64."""
        return np.concatenate([np.empty((0, 2), np.int64), *(store_keys(batch[DIGEST]) for batch in self.batches())])


def store_keys(digests: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return digests of 16 bytes as keys of a [`Store`], `(digests, 2)` int64."""
    joined = b"".join(digests.to_pylist())
    return np.frombuffer(joined, dtype="<i8").reshape(-1, 2).astype(np.int64, copy=False)


def _name(path: Path) -> str:
    return PATTERN.replace("*", sha256(path)[:16])


def _of_equal_size(tables: Iterator[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    waiting = schema.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table.cast(schema)])
        while len(waiting) >= ROWS_AT_ONCE:
            yield waiting[:ROWS_AT_ONCE].combine_chunks()
            waiting = waiting[ROWS_AT_ONCE:]
    if len(waiting):
        yield waiting.combine_chunks()
