"""Small tars of captions, and their order as streams that several processes and workers read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from llm2clip.data import CaptionSource, StreamingCaptionImageDataset
from llm2clip.data.stream_order import Lanes
from llm2clip.data.streams import SampleStream
from tests.tars import write_tar

PER_TAR = 3
TARS, BATCH = 9, 2


def write_tars(folder: Path, count: int, rows: Sequence[int] = (), name: str = "caption") -> CaptionSource:
    for shard in range(count):
        numbers = range(rows[shard] if rows else PER_TAR)
        files = [(f"s{shard}r{row}.txt", f"{name} {shard} {row}".encode()) for row in numbers]
        write_tar(folder / f"{shard:05d}.tar", files)
    return CaptionSource(str(folder), caption_columns=["txt"], streaming=True)


def every_caption(count: int) -> list[str]:
    return sorted(f"caption {shard} {row}" for shard in range(count) for row in range(PER_TAR))


def caption(row: dict[str, Any]) -> str:
    """The only text of a row."""
    (text,) = row["caption"].values()
    return text


def opened(source: CaptionSource, rank: int = 0, world: int = 1, **options: Any) -> StreamingCaptionImageDataset:
    options = {"row_counts": [PER_TAR] * TARS, "repeat": True, "shuffle_block": 4, **options}
    return StreamingCaptionImageDataset(source, False, rank=rank, world_size=world, **options)


def batches(
    stream: SampleStream, workers: int, lanes: Lanes, start: int = 0, size: int = BATCH
) -> Iterator[list[str]]:
    """The captions of the batches of a process, from a row of the stream on."""
    stream.batch_size, stream.lanes, stream.start = size, lanes, start
    loader = DataLoader(stream, batch_size=size, num_workers=workers, collate_fn=list)
    return (list(map(caption, batch)) for batch in loader)


def steps_of(
    streams: Sequence[SampleStream], workers: int, lanes: Lanes, start: int = 0, size: int = BATCH
) -> Iterator[list[str]]:
    """The captions of the batches of all processes together."""
    ranks = [batches(stream, workers, lanes, start, size) for stream in streams]
    return (list(itertools.chain(*step)) for step in zip(*ranks, strict=True))
