"""Parts of large parquet files: whole row groups, which are read without the rest of the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.utils.files import READ_SIZE


class RowGroups(NamedTuple):
    """Consecutive row groups of a parquet file.

    Attributes:
        start, stop: The row groups, the last one excluded.
        total: Row groups of the file.
        first_row: Number of the first row in the file.
        first_byte, last_byte: The bytes of the file that contain them, the last one excluded. The parts of a file
            contain all of its bytes together.
    """

    start: int
    stop: int
    total: int
    first_row: int
    first_byte: int
    last_byte: int

    @property
    def suffix(self) -> str:
        """What the names of a part's files have after that of the file."""
        return f".{self.start:05}-{self.stop:05}"


def cut_parquet(path: str, rows: int) -> list[RowGroups]:
    """Cut a parquet file into parts of at most `rows` rows, or of one row group where that has more.

    Returns:
        The parts; none of a file that has no more rows than that, or a single row group, or that cannot be read.
    """
    try:
        with fsspec.open(path, "rb") as file:
            metadata = pq.ParquetFile(file).metadata
            size = int(file.seek(0, 2))
    except (OSError, pa.ArrowException):
        return []  # the error of reading it names it
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if metadata.num_rows <= rows or len(groups) < 2:
        return []
    starts, filled = [0], 0
    for number, group in enumerate(groups):
        if filled and filled + group.num_rows > rows:
            starts.append(number)
            filled = 0
        filled += group.num_rows
    before = np.cumsum([0, *(group.num_rows for group in groups)])
    stops = [*starts[1:], len(groups)]
    bounds = [0, *(_first_byte(groups[start]) for start in starts[1:]), size]
    return [
        RowGroups(start, stop, len(groups), int(before[start]), bounds[number], bounds[number + 1])
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]


def _first_byte(group: Any) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    offsets = [(column.dictionary_page_offset, column.data_page_offset) for column in columns]
    return int(min(offset for pair in offsets for offset in pair if offset))


def rows_of_part(path: str, part: RowGroups, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part in their order.

    Raises:
        OSError, ValueError: The file cannot be read, or is another one than was cut.
    """
    with fsspec.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        if parquet.metadata.num_row_groups != part.total:
            raise ValueError(f"it has {parquet.metadata.num_row_groups} row groups, {part.total} a moment ago")
        for batch in parquet.iter_batches(1000, list(range(part.start, part.stop)), list(columns)):
            yield from batch.to_pylist()


def part_checksum(path: Path, first_byte: int, last_byte: int) -> str:
    """Compute the SHA-256 of the bytes of a part of a local file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(first_byte)
        while block := file.read(min(READ_SIZE, last_byte - file.tell())):
            digest.update(block)
    return digest.hexdigest()
