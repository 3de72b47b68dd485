"""How many rows fit into the shuffle buffers of a machine, which hold them as they are stored: images encoded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import fsspec

from llm2clip.data.shard_rows import ShardRows

# What Python needs for a row beside its images and texts, in bytes.
OVERHEAD = 1024
# Rows whose sizes are averaged where a file does not tell them.
MEASURED = 32
# Rows in the buffers of a reader, which are read before its first batch, and read again when a run is resumed. More
# rows hardly mix better, and would keep small ones waiting.
MAX_ROWS = 20_000


def row_bytes(shards: ShardRows, row_counts: Sequence[int] | None) -> float:
    """Return the mean size of a row in bytes: that of the first file with rows, or of the first rows.

    Raises:
        SourceError: The first rows cannot be read.
    """
    first = next((file for file, rows in enumerate(row_counts or ()) if rows), None)
    if first is not None and shards.files and row_counts is not None:
        files, name = fsspec.core.url_to_fs(shards.files[first])
        return int(files.size(name)) / row_counts[first] + OVERHEAD
    sizes = [_size(list(row.values())) for _, row in itertools.islice(shards.read_all(None), MEASURED)]
    return sum(sizes) / max(1, len(sizes)) + OVERHEAD


def _size(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, (bytes, str)) else 8


def buffer_rows(megabytes: float, sizes: Sequence[float], counts: Sequence[int | None], readers: int) -> list[int]:
    """Divide the memory of a machine among the shuffle buffers of its readers.

    Args:
        megabytes: Memory for all buffers of the machine, in MiB; 0 is no buffer.
        sizes: Mean size of a row of each stream in bytes.
        counts: Number of rows of each stream, if known: larger streams have more of the memory.
        readers: Number of readers of the machine.

    Returns:
        For each stream the number of rows in the buffer of a reader, at least 1 unless there is none; together at
        most `MAX_ROWS`.
    """
    if not sizes or not megabytes:
        return [0] * len(sizes)
    known = [count for count in counts if count is not None]
    typical = sum(known) / len(known) if known else 1.0
    weights = [size * (typical if count is None else count) for size, count in zip(sizes, counts, strict=True)]
    memory = megabytes * 2**20 / readers
    rows = [memory * weight / sum(weights) / size for size, weight in zip(sizes, weights, strict=True)]
    share = min(1.0, MAX_ROWS / sum(rows))
    return [max(1, math.floor(number * share)) for number in rows]
