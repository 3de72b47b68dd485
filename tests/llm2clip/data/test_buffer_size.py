"""Rows in the shuffle buffers of a machine, from the memory for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.data import CaptionSource, StreamingCaptionImageDataset
from llm2clip.data.buffer_size import MAX_ROWS, OVERHEAD, buffer_rows, row_bytes
from tests.tars import write_tar


def test_memory_is_divided_among_readers_and_by_the_sizes_of_streams() -> None:
    kib = 1024
    assert buffer_rows(64, [16 * kib], [None], 8) == [512]
    assert buffer_rows(64, [16 * kib], [10**6], 16) == [256]
    rows = buffer_rows(96, [10 * kib, 20 * kib], [1000, 1000], 1)
    assert rows == [3276, 3276]
    assert sum(count * size for count, size in zip(rows, (10 * kib, 20 * kib), strict=True)) <= 96 * kib**2
    assert buffer_rows(1, [16 * kib], [1000], 1000) == [1]
    assert buffer_rows(10**6, [kib], [10**9], 4) == [MAX_ROWS]
    assert buffer_rows(10**6, [kib, 2 * kib], [3000, 1000], 4) == [3 * MAX_ROWS // 4, MAX_ROWS // 4]
    assert buffer_rows(64, [], [], 1) == []
    assert buffer_rows(0, [16 * kib, kib], [1000, None], 4) == [0, 0]


@pytest.mark.parametrize("counted", [True, False])
def test_rows_are_measured_as_they_are_stored(counted: bool, tmp_path: Path) -> None:
    images = 40_000
    contents = {"jpg": b"x" * images, "txt": b"a caption"}
    write_tar(tmp_path / "0.tar", [(f"{row}.{ending}", contents[ending]) for row in range(20) for ending in contents])
    source = CaptionSource(str(tmp_path), caption_columns=["txt"], image_column="jpg", streaming=True)
    stream = StreamingCaptionImageDataset(source, lambda image, key: image)  # type: ignore[arg-type]
    found = row_bytes(stream.reader.shards, [20] if counted else None)
    assert images + OVERHEAD < found < 1.1 * images + OVERHEAD
