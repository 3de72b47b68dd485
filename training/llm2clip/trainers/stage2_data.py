"""The training set of stage 2, made of the sources of its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object

from llm2clip.command_line.progress import ProgressBar
from llm2clip.data import (
    CaptionImageDataset,
    CaptionSource,
    EvalTransform,
    StreamingCaptionImageDataset,
    TrainTransform,
)
from llm2clip.data.formats import SourceError
from llm2clip.data.shard_rows import ShardRows, open_shards
from llm2clip.data.sources import open_source
from llm2clip.data.streams import SampleStream, TableSource, first_counts
from llm2clip.trainers.stage2_captions import SourceCaptions, Stage2Captions
from llm2clip.trainers.stage2_config import Stage2Recipe


def build_dataset(config: Stage2Recipe, image_processor: Any, captions: Stage2Captions | None = None) -> Any:
    """Open the training set.

    Args:
        captions: The embeddings of the sources.

    Raises:
        ValueError: The sources cannot be mixed as set.
    """
    sources = [CaptionSource.from_dict(source) for source in config.sources]
    evaluation = EvalTransform(image_processor, config.image_backend)
    training = TrainTransform(image_processor, scale=(config.crop_scale[0], config.crop_scale[1]))
    options: dict[str, Any] = {"seed": config.sampling_seed, "on_error": config.on_error}
    if config.streams:
        embeddings = [SourceCaptions()] * len(sources) if captions is None else captions.sources
        stream = _stream(config, sources, embeddings, (evaluation, training), options)
        _require_steps(config, stream.num_rows)
        return stream
    dataset = CaptionImageDataset(sources, evaluation, training, **options)
    dataset.mixing = config.mixing
    return dataset


def _stream(
    config: Stage2Recipe,
    sources: Sequence[CaptionSource],
    embeddings: Sequence[SourceCaptions],
    transforms: tuple[EvalTransform, TrainTransform],
    options: dict[str, Any],
) -> SampleStream:
    """Build one stream of all sources."""
    process = {"rank": config.process_index, "world_size": config.world_size}
    streamed: list[Any] = []
    for source, stored in zip(sources, embeddings, strict=True):
        if not source.streaming:
            table = CaptionImageDataset(source, *transforms, **options, cache=stored.lookup)
            streamed.append(TableSource(table, config.sampling_seed))
            continue
        opened = stored.opened or open_source(source)
        beside = row_counts = None
        if stored.sidecars is not None:
            beside, row_counts = stored.sidecars.open, stored.sidecars.row_counts
        if row_counts is None:
            _, shards = open_shards(source, opened, with_images=False)
            row_counts = count_stream(shards, source, config.process_index, config.world_size)
        more: dict[str, Any] = {"cache": stored.lookup, "embeddings": beside}
        more |= {"row_counts": row_counts, "opened": opened}
        more |= {"repeat": True, "shuffle_block": config.shuffle_block, **process}
        streamed.append(StreamingCaptionImageDataset(source, *transforms, **{**options, **more}))
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


def count_stream(shards: ShardRows, source: CaptionSource, rank: int, world_size: int) -> list[int]:
    """Count the rows of the files of a stream, a share of them in every process; the first ones with `max_samples`.

    Raises:
        SourceError: A file is damaged; in every process.
    """
    if source.max_samples is not None:
        return list(first_counts(shards, source.max_samples))
    share, counts, fault = range(rank, shards.num_files, world_size), [], None
    with ProgressBar(f"Rows of {source.path}", len(share), "file", rank == 0) as bar:
        for file in share:
            try:
                counts.append(shards.count(file))
            except SourceError as error:  # the other processes must not wait
                fault = str(error)
                break
            bar.update()
    counted = gather_object([(counts, fault)])
    for _, message in counted:
        if message is not None:
            raise SourceError(message)
    return [counted[number % world_size][0][number // world_size] for number in range(shards.num_files)]
