"""The training set of stage 2, made of the sources of its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object

from llm2clip.command_line.progress import ProgressBar
from llm2clip.data import CaptionImageDataset, CaptionSource, StreamingCaptionImageDataset
from llm2clip.data.formats import SourceError
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sources import open_source
from llm2clip.data.streams import SampleStream, TableSource
from llm2clip.trainers.stage2_captions import SourceCaptions, Stage2Captions
from llm2clip.trainers.stage2_config import Stage2Recipe


def build_dataset(config: Stage2Recipe, captions: Stage2Captions | None = None) -> Any:
    """Open the training set.

    Args:
        captions: The embeddings of the sources.

    Raises:
        ValueError: The sources cannot be mixed as set.
    """
    sources = [CaptionSource.from_dict(source) for source in config.sources]
    if config.streams:
        stream = _stream(config, sources, [SourceCaptions()] * len(sources) if captions is None else captions.sources)
        _require_steps(config, stream.num_rows)
        return stream
    dataset = CaptionImageDataset(sources, config.sampling_seed)
    dataset.mixing = config.mixing
    return dataset


def _stream(
    config: Stage2Recipe, sources: Sequence[CaptionSource], embeddings: Sequence[SourceCaptions]
) -> SampleStream:
    """Build one stream of all sources."""
    process: dict[str, Any] = {"rank": config.process_index, "world_size": config.world_size}
    streamed: list[Any] = []
    for source, stored in zip(sources, embeddings, strict=True):
        if not source.streaming:
            table = CaptionImageDataset(source, config.sampling_seed)
            streamed.append(TableSource(table, config.sampling_seed, stored.cache))
            continue
        opened = stored.opened or open_source(source)
        row_counts = None if stored.sidecars is None else stored.sidecars.row_counts
        stream = StreamingCaptionImageDataset(
            source,
            seed=config.sampling_seed,
            shuffle_block=config.shuffle_block,
            repeat=True,
            embeddings=stored.sidecars or stored.cache,
            row_counts=row_counts or count_stream(ShardedSource(source, opened), **process),
            opened=opened,
            **process,
        )
        streamed.append(stream)
    if len(streamed) == 1 and isinstance(streamed[0], SampleStream):
        return streamed[0]
    weights = [source.weight for source in sources]
    return SampleStream(streamed, config.sampling_seed, mixing=config.mixing, weights=weights, **process)


def _require_steps(config: Stage2Recipe, num_rows: int) -> None:
    """Raise an error with the number of steps unless they are set: a stream has no length."""
    if config.max_steps > 0:
        return
    batch = config.per_device_train_batch_size * config.world_size * config.gradient_accumulation_steps
    steps = math.ceil(config.num_train_epochs * num_rows / batch)
    raise ValueError(
        f"a stream is trained for a number of steps, but max_steps is {config.max_steps}: "
        f"{config.num_train_epochs:g} epochs of {num_rows} rows are max_steps: {steps}."
    )


def count_stream(source: ShardedSource, rank: int, world_size: int) -> list[int]:
    """Count the rows of the files of a stream, a share of them in every process; the first ones with `max_samples`.

    Raises:
        SourceError: A file is damaged; in every process.
    """
    if source.source.max_samples is not None:
        return list(source.counts())
    share, counts, fault = range(rank, len(source.files), world_size), list[int](), None
    with ProgressBar(f"Rows of {source.source.path}", len(share), "file", rank == 0) as bar:
        try:
            for count in source.counts(share):
                counts.append(count)
                bar.update()
        except SourceError as error:  # the other processes must not wait
            fault = str(error)
    counted = gather_object([(counts, fault)])
    for _, message in counted:
        if message is not None:
            raise SourceError(message)
    return [counted[number % world_size][0][number // world_size] for number in range(len(source.files))]
