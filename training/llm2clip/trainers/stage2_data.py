"""The training set of stage 2, made of the sources of its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llm2clip.data import (
    CaptionImageDataset,
    CaptionSource,
    EvalTransform,
    StreamingCaptionImageDataset,
    TrainTransform,
)
from llm2clip.data.captioned_images import TableSource
from llm2clip.data.sources import open_source
from llm2clip.data.streams import SampleStream
from llm2clip.data.transforms import output_size
from llm2clip.trainers.frozen_layers import FrozenLayers
from llm2clip.trainers.frozen_states import FrozenStatesDataset
from llm2clip.trainers.row_counts import count_stream
from llm2clip.trainers.stage2_captions import SourceCaptions, Stage2Captions
from llm2clip.trainers.stage2_config import Stage2Config
from modeling_llm2clip import LLM2CLIPModel


def build_dataset(
    config: Stage2Config, model: LLM2CLIPModel, image_processor: Any, captions: Stage2Captions | None = None
) -> tuple[Any, FrozenLayers | None]:
    """Load the training set, and the frozen layers of the vision tower, if any.

    Args:
        captions: The embeddings of the sources.

    Raises:
        ValueError: A stream is combined with stored states, or the sources cannot be mixed as set.
    """
    sources = [CaptionSource.from_dict(source) for source in config.sources]
    evaluation = EvalTransform(image_processor, config.image_backend)
    training = TrainTransform(image_processor, scale=(config.crop_scale[0], config.crop_scale[1]))
    options: dict[str, Any] = {
        "seed": config.sampling_seed, "on_error": config.on_error, "max_pixels": config.max_pixels,
    }  # fmt: skip
    frozen = None
    if config.freeze_vision_layers:
        frozen = FrozenLayers(model.vision_model, config.freeze_vision_layers, output_size(image_processor))
    if config.streams:
        if config.frozen_states_dir:
            raise ValueError("frozen_states_dir is for sources that are read in random order: no streams or weights.")
        embeddings = [SourceCaptions()] * len(sources) if captions is None else captions.sources
        stream = _stream(config, sources, embeddings, (evaluation, training), options)
        _require_steps(config, stream.num_rows)
        return stream, frozen
    if not config.frozen_states_dir:
        return CaptionImageDataset(sources, evaluation, training, **options), frozen
    assert frozen is not None
    captioned = CaptionImageDataset(sources, None, **options)
    config.check_length(len(captioned))
    model.vision_model.to(config.device)
    dataset = FrozenStatesDataset(
        captions=captioned,
        images=CaptionImageDataset(sources, evaluation, **options),
        frozen=frozen,
        image_processor=image_processor,
        folder=config.frozen_states_dir,
        batch_size=config.per_device_eval_batch_size,
        num_workers=config.dataloader_num_workers,
    )
    return dataset, frozen


def _stream(
    config: Stage2Config,
    sources: Sequence[CaptionSource],
    embeddings: Sequence[SourceCaptions],
    transforms: tuple[EvalTransform, TrainTransform],
    options: dict[str, Any],
) -> SampleStream:
    """Build one stream of all sources."""
    place = {"rank": config.process_index, "world_size": config.world_size}
    streamed: list[Any] = []
    for source, found in zip(sources, embeddings, strict=True):
        if not source.streaming:
            table = CaptionImageDataset(source, *transforms, **options, cache=found.lookup)
            streamed.append(TableSource(table, config.sampling_seed))
            continue
        opened = found.opened or open_source(source)
        row_counts: Sequence[int] | None
        if found.sidecars is None:
            row_counts = count_stream(
                source.path, opened.files, config.process_index, config.world_size, source.max_samples
            )
        else:
            row_counts = found.sidecars.row_counts
        beside = None if found.sidecars is None else found.sidecars.open
        more: dict[str, Any] = {"cache": found.lookup, "embeddings": beside}
        more |= {"row_counts": row_counts, "opened": opened}
        more |= {"repeat": True, "shuffle_block": config.shuffle_block, **place}
        streamed.append(StreamingCaptionImageDataset(source, *transforms, **{**options, **more}))
    if len(streamed) == 1 and isinstance(streamed[0], SampleStream):
        return streamed[0]
    weights = [source.weight for source in sources]
    return SampleStream(streamed, config.sampling_seed, mixing=config.mixing, weights=weights, **place)


def _require_steps(config: Stage2Config, num_rows: int | None) -> None:
    """Raise an error, with the number of steps if it can be computed, unless they are set: a stream has no length."""
    if config.max_steps > 0:
        return
    advice = "set it"
    if num_rows is not None:
        batch = config.per_device_train_batch_size * config.world_size * config.gradient_accumulation_steps
        steps = math.ceil(config.num_train_epochs * num_rows / batch)
        advice = f"{config.num_train_epochs:g} epochs of {num_rows} rows are max_steps: {steps}"
    raise ValueError(f"a stream is trained for a number of steps, but max_steps is {config.max_steps}: {advice}.")
