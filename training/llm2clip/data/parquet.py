"""Rows of parquet files from any row on, and the parts into which a large file is cut."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.formats import SourceError
from llm2clip.data.tars import fewer_rows
from llm2clip.files.library_errors import wrap_read_errors

# Rows of a file that are decoded at once, and bytes of each column that are read at once.
BATCH, BUFFER = 64, 2**20


class RowRange(NamedTuple):
    """Some rows of a file.

    Attributes:
        start, stop: The first one, and the one after the last.
        total: Rows of the file.
    """

    start: int
    stop: int
    total: int

    @property
    def suffix(self) -> str:
        """What the names of files have that belong to these rows, after the name of the file."""
        return f".{self.start:08}-{self.stop:08}"


def parquet_rows(
    path: str, columns: Collection[str], rows: Iterable[int] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of a parquet file with their numbers; row groups without one of them are not read.

    The arguments are those of [`tar_rows`](llm2clip.data.tars.tar_rows).

    Raises:
        SourceError: The file cannot be read, or has fewer rows.
    """
    with wrap_read_errors(path, SourceError), fsspec.open(path, "rb") as file:
        # Many files are open at a time: without a buffer, each would hold a whole row group.
        parquet = pq.ParquetFile(file, buffer_size=BUFFER)
        numbers = iter(range(parquet.metadata.num_rows) if rows is None else rows)
        wanted, end = next(numbers, None), 0
        # A forked process has none of the threads of Arrow.
        options: dict[str, Any] = {"batch_size": BATCH, "columns": list(columns), "use_threads": False}
        for group in range(parquet.num_row_groups):
            start, end = end, end + parquet.metadata.row_group(group).num_rows
            if wanted is None or wanted >= end:
                continue
            for batch in parquet.iter_batches(row_groups=[group], **options):
                values: list[dict[str, Any]] | None = None
                while wanted is not None and wanted < start + len(batch):
                    values = batch.to_pylist() if values is None else values
                    yield wanted, values[wanted - start]
                    wanted = next(numbers, None)
                start += len(batch)
                if wanted is None or wanted >= end:
                    break
        if wanted is not None:
            raise fewer_rows(path, wanted + 1)


def cut_parquet(path: str, columns: Sequence[str], captions: int, text_bytes: int) -> list[RowRange]:
    """Cut a parquet file into ranges of rows of about the same size at most, at its row groups or within one.

    Args:
        path: Path or URL.
        columns: The columns of captions, texts or lists of texts, whose numbers and bytes are in the footer.
        captions, text_bytes: Captions of a range, and the bytes of their columns before compression.

    Returns:
        The ranges; none of a file that has no more than that, or that cannot be read.
    """
    try:
        with fsspec.open(path, "rb") as file:
            metadata = pq.ParquetFile(file).metadata
    except (OSError, pa.ArrowException):
        return []  # the error of reading it names it
    limits = np.array([captions, text_bytes])
    cuts, held, end = [0], np.zeros(2, dtype=np.int64), 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        start, end = end, end + group.num_rows
        parts = [group.column(column) for column in range(group.num_columns)]
        parts = [part for part in parts if _is_of(part.path_in_schema, columns)]
        texts = max(sum(part.num_values for part in parts), group.num_rows)
        size = np.array([texts, sum(part.total_uncompressed_size for part in parts)])
        if held.any() and (held + size > limits).any():
            cuts.append(start)
            held = np.zeros(2, dtype=np.int64)
        if (size > limits).any():
            rows = int((group.num_rows * limits // np.maximum(size, 1)).min())
            cuts += range(start, end, max(1, rows))[1:]
            size = np.minimum(size, limits)
        held = held + size
    cuts.append(metadata.num_rows)
    return [RowRange(start, stop, cuts[-1]) for start, stop in itertools.pairwise(cuts)] if len(cuts) > 2 else []


def _is_of(path: str, columns: Sequence[str]) -> bool:
    """Tell whether a column of a parquet file is one of these, or of the texts in its lists."""
    return any(path == column or path.startswith(f"{column}.") for column in columns)
