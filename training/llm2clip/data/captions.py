"""The captions of sources, as they are embedded: all, or each distinct one once."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from datasets.distributed import split_dataset_by_node

from llm2clip.command_line.processes import gather_results, process_state
from llm2clip.command_line.progress import ProgressBar
from llm2clip.data.formats import SourceError
from llm2clip.data.rows import column_texts
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sources import CaptionSource, load_source, row_batches
from llm2clip.files.library_errors import wrap_read_errors

logger = logging.getLogger(__name__)

# Files of each process whose captions all processes exchange at once.
FILES_AT_ONCE = 16


def caption_batches(
    source: CaptionSource, rank: int = 0, world_size: int = 1, show_progress: bool = True
) -> Iterator[list[str]]:
    """Yield the captions of this rank's share of a source by row, column and list entry, a thousand rows at a time."""
    return (texts for _, texts in _numbered_batches(source, rank, world_size, show_progress))


def _numbered_batches(
    source: CaptionSource, rank: int, world_size: int, show_progress: bool
) -> Iterator[tuple[int, list[str]]]:
    """Yield the batches of [`caption_batches`], in a stream with the number of the file that each is of."""
    total = None
    batches: Iterator[tuple[int, list[Any]]]
    if source.streaming:
        by_file = itertools.groupby(ShardedSource(source).share(rank, world_size), itemgetter(0))
        batches = ((file, batch) for file, rows in by_file for batch in _in_batches(row for _, _, row in rows))
    else:
        table: Any = load_source(source, with_images=False)
        if world_size > 1:
            if rank >= len(table):
                return  # an empty part is an error of datasets
            table = split_dataset_by_node(table, rank, world_size)
        batches, total = ((0, batch) for batch in row_batches(table)), len(table)
    num_empty = 0
    bar = ProgressBar(f"Captions of {source.path}", total, "row", show_progress and rank == 0)
    with bar, wrap_read_errors(source.path, SourceError):
        for file, batch in batches:
            texts = [[text for name in source.caption_columns for text in column_texts(row, name)] for row in batch]
            num_empty += texts.count([])
            yield file, list(itertools.chain.from_iterable(texts))
            bar.update(len(texts))
    if num_empty:
        logger.warning("%d rows of %s have no caption.", num_empty, source.path)


def _in_batches(rows: Iterator[Any]) -> Iterator[list[Any]]:
    return iter(lambda: list(itertools.islice(rows, 1000)), [])


def distinct_captions(
    sources: CaptionSource | Sequence[CaptionSource], show_progress: bool = True, in_all_processes: bool = False
) -> list[str]:
    """Collect the distinct captions of sources, which an embedding cache for them must contain.

    Captions are distinct if they differ in more than surrounding white space, because their embeddings differ. They
    are in order of first appearance: by source, row, caption column and list entry. Sources may be streams.

    Args:
        in_all_processes: Whether all processes of the run call this, so that each reads its own files of a stream.
    """
    captions: dict[str, None] = {}
    for source in [sources] if isinstance(sources, CaptionSource) else sources:
        if in_all_processes and source.streaming and source.max_samples is None:
            read = _captions_by_file(source, show_progress)
            while True:
                parts = gather_results(partial(next, read, None))
                if all(part is None for part in parts):
                    break
                for file in sorted(itertools.chain.from_iterable(filter(None, parts))):
                    captions.update(parts[file % len(parts)][file])
        else:
            for texts in caption_batches(source, show_progress=show_progress):
                captions.update(dict.fromkeys(texts))
    return list(captions)


def _captions_by_file(source: CaptionSource, show_progress: bool) -> Iterator[Any]:
    """Yield the distinct captions of this process's files of a stream by their numbers, some files at a time."""
    state = process_state()
    captions: dict[int, dict[str, None]] = {}
    end = step = FILES_AT_ONCE * state.num_processes
    for file, texts in _numbered_batches(source, state.process_index, state.num_processes, show_progress):
        while file >= end:
            yield captions
            captions, end = {}, end + step
        captions.setdefault(file, {}).update(dict.fromkeys(texts))
    yield captions
