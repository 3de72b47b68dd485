"""The captions of sources, as they are embedded: all, or each distinct one once."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from datasets.distributed import split_dataset_by_node

from llm2clip.data.captioned_images import column_texts
from llm2clip.data.opened_table import SourceError
from llm2clip.data.shard_rows import open_shards
from llm2clip.data.sources import CaptionSource, open_source, row_batches, select_source
from llm2clip.utils.library_errors import wrap_read_errors
from llm2clip.utils.progress import ProgressBar

logger = logging.getLogger(__name__)


def caption_batches(
    source: CaptionSource, rank: int = 0, world_size: int = 1, show_progress: bool = True
) -> Iterator[list[str]]:
    """Yield the captions of this rank's share of a source by row, column and list entry, a thousand rows at a time."""
    opened = open_source(source)
    total = None
    if source.streaming:
        _, shards = open_shards(source, opened, with_images=False)
        rows = (row for _, _, row in shards.share(rank, world_size, source.max_samples))
        batches = iter(lambda: list(itertools.islice(rows, 1000)), [])
    else:
        table: Any = select_source(source, opened, with_images=False)
        if world_size > 1:
            if rank >= len(table):
                return  # an empty part is an error of datasets
            table = split_dataset_by_node(table, rank, world_size)
        batches, total = row_batches(table), len(table)
    num_empty = 0
    bar = ProgressBar(f"Captions of {source.path}", total, "row", show_progress and rank == 0)
    with bar, wrap_read_errors(source.path, SourceError):
        for batch in batches:
            texts = [[text for name in source.caption_columns for text in column_texts(row, name)] for row in batch]
            num_empty += texts.count([])
            yield list(itertools.chain.from_iterable(texts))
            bar.update(len(texts))
    if num_empty:
        logger.warning("%d rows of %s have no caption.", num_empty, source.path)


def distinct_captions(sources: CaptionSource | Sequence[CaptionSource], show_progress: bool = True) -> list[str]:
    """Collect the distinct captions of sources, which an embedding cache for them must contain.

    Captions are distinct if they differ in more than surrounding white space, because their embeddings differ. They
    are in order of first appearance: by source, row, caption column and list entry. Sources may be streams.
    """
    captions: dict[str, None] = {}
    for source in [sources] if isinstance(sources, CaptionSource) else sources:
        for texts in caption_batches(source, show_progress=show_progress):
            captions.update(dict.fromkeys(texts))
    return list(captions)
