"""Where the caption embeddings of stage 2 come from: a cache, sidecars beside the shards of a stream, or the LLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from llm2clip.data import CaptionSource, caption_batches
from llm2clip.data.opened_table import OpenedTable
from llm2clip.data.shards import ShardedSource
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.encoders import OurEncoder
from llm2clip.encoders.cache_of_model import open_cache_of_model, open_sidecars_of_model
from llm2clip.evaluation.data import RetrievalData
from llm2clip.store import EmbeddingCache, MissingCaptionError, StoreManifest
from llm2clip.store.store import lies_beside_shards
from llm2clip.trainers.stage2_config import Folder, Stage2Recipe, as_folder
from llm2clip.trainers.stored_rows import require_captions
from llm2clip.utils.processes import sum_over_processes
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor


@dataclass(frozen=True)
class SourceCaptions:
    """The caption embeddings of a source.

    Attributes:
        lookup: Where its samples look them up one by one; None if they come with its rows, or with whole batches.
        sidecars: Its sidecars, if it has any.
        opened: Its table, if it is open.
    """

    lookup: EmbeddingCache | None = None
    sidecars: SourceSidecars | None = None
    opened: OpenedTable | None = None


@dataclass(frozen=True)
class Stage2Captions:
    """The caption embeddings of a run.

    Attributes:
        embed: Maps captions of retrieval sets to the embeddings of the LLM.
        sources: The embeddings of each source.
        cache: The cache of all sources, if they have one.
    """

    embed: Callable[[list[str]], Tensor]
    sources: Sequence[SourceCaptions]
    cache: EmbeddingCache | None = None


def open_captions(
    config: Stage2Recipe,
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    retrieval: Mapping[str, RetrievalData],
) -> Stage2Captions:
    """Open the caption embeddings of a run.

    Raises:
        StoreError: They were made by another encoder, or are incomplete or damaged.
        MissingCaptionError: They lack captions of a retrieval set or of the training set.
        ValueError: Sidecars are not those of a stream, or the dtypes of several stores differ.
    """
    sources = [CaptionSource.from_dict(source) for source in config.sources]
    if not config.caches:
        encoder = OurEncoder(model.text_model, processor)
        online = partial(encoder.embed, show_progress_bar=False)
        return Stage2Captions(online, [SourceCaptions() for _ in sources])
    folders = cast(list[Folder], config.caches)
    caches: dict[Folder, EmbeddingCache] = {}
    for folder in dict.fromkeys(folders):
        if isinstance(folder, tuple) and any(map(lies_beside_shards, folder)):
            raise ValueError(f"two text encoders read caches; embed into {', '.join(folder)} with store: cache.")
        if isinstance(folder, tuple) or not lies_beside_shards(folder):
            caches[folder] = _open_cache(config, folder, model, processor)
    stored = [
        _open_sidecars(config, str(folder), source, model, processor)
        if folder not in caches
        else SourceCaptions(caches[folder])
        for folder, source in zip(folders, sources, strict=True)
    ]
    _refuse_other_dtypes(folders, stored)
    embed = _open_measured(config, caches, model, processor, retrieval)
    if config.verify_cache:
        for folder, cache in caches.items():
            used = [source for number, source in enumerate(sources) if folders[number] == folder]
            _verify(config, cache, used)
    if len(caches) == 1 and not any(captions.sidecars for captions in stored):
        # One look-up for a whole batch is faster.
        return Stage2Captions(embed, [SourceCaptions() for _ in sources], next(iter(caches.values())))
    return Stage2Captions(embed, stored)


def _open_cache(
    config: Stage2Recipe, path: Folder, model: LLM2CLIPModel, processor: LLM2CLIPProcessor
) -> EmbeddingCache:
    is_trained = config.model_name_or_path is not None
    model_config = cast(LLM2CLIPConfig, model.config)
    cache = open_cache_of_model(path, model_config, processor.tokenizer, is_trained=is_trained, verify=False)
    _refuse_other_width(path, cache.manifest, model)
    return cache


def _open_measured(
    config: Stage2Recipe,
    caches: Mapping[Folder, EmbeddingCache],
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    retrieval: Mapping[str, RetrievalData],
) -> Callable[[list[str]], Tensor]:
    """Open the cache that contains the captions of the retrieval sets."""
    path = as_folder(config.eval_embedding_cache or config.embedding_cache)
    if config.eval_embedding_cache is None and path not in caches:
        if retrieval:
            raise ValueError(
                f"{path or 'the embedding_cache of a source'} contains sidecars or is not for eval_sources. Embed the "
                "captions of eval_sources into a cache (`llm2clip embed`, store: cache), and set eval_embedding_cache "
                "to it."
            )
        return _no_retrieval
    assert path is not None
    cache = caches.get(path) or _open_cache(config, path, model, processor)
    for name, measured in retrieval.items():
        missing = (~cache.contains(measured.texts)).sum()
        if missing:
            raise MissingCaptionError(
                f"the cache {cache.path} lacks {missing} of the {len(measured.texts)} captions of eval_sources "
                f"{name!r}; run `llm2clip embed` on that source too."
            )
    return cache.lookup


def _open_sidecars(
    config: Stage2Recipe, folder: str, source: CaptionSource, model: LLM2CLIPModel, processor: LLM2CLIPProcessor
) -> SourceCaptions:
    if not source.streaming:
        raise ValueError(
            f"{folder} contains sidecars, which only a source with streaming: true reads. Embed {source.path} into a "
            "cache (`llm2clip embed`, store: cache), and set its embedding_cache to that."
        )
    source = _drawn(source)
    opened = ShardedSource(source)
    sidecars = open_sidecars_of_model(
        folder,
        opened.shards,
        source.caption_columns,
        cast(LLM2CLIPConfig, model.config),
        processor.tokenizer,
        is_trained=config.model_name_or_path is not None,
    )
    _refuse_other_width(folder, sidecars.open(0).manifest, model)
    return SourceCaptions(sidecars=sidecars, opened=opened.opened)


def _refuse_other_dtypes(folders: Sequence[Folder], stored: Sequence[SourceCaptions]) -> None:
    """Raise an error if the embeddings of a batch would have several dtypes."""
    dtypes: dict[str, Folder] = {}
    for folder, captions in zip(folders, stored, strict=True):
        manifest = captions.lookup.manifest if captions.lookup is not None else None
        if captions.sidecars is not None:
            manifest = captions.sidecars.open(0).manifest
        assert manifest is not None
        dtypes[manifest.dtype] = folder
    if len(dtypes) > 1:
        shown = ", ".join(f"{folder} has {dtype}" for dtype, folder in dtypes.items())
        raise ValueError(f"the embeddings of all sources need the same dtype, but {shown}; embed one of them again.")


def _verify(config: Stage2Recipe, cache: EmbeddingCache, sources: Sequence[CaptionSource]) -> None:
    """Check that a cache is undamaged and contains the captions of the sources that use it; a stream's are skipped."""
    cache.require_unchanged(config.process_index, config.world_size)
    for source in sources:
        if not source.streaming:
            _require_captions_of(config, cache, source)


def _refuse_other_width(path: Folder, manifest: StoreManifest, model: LLM2CLIPModel) -> None:
    width = model.config.text_config.hidden_size
    if manifest.width != width:
        raise ValueError(
            f"the cache {path} contains embeddings of width {manifest.width} (of {manifest.encoder}), "
            f"but {model.config.text_model_name_or_path} gives {width}; embed the captions with that text tower."
        )


def _drawn(source: CaptionSource) -> CaptionSource:
    """Return a source with the caption columns that training draws from."""
    if source.caption_weights is None:
        return source
    drawn = [name for name, weight in zip(source.caption_columns, source.caption_weights, strict=True) if weight]
    return replace(source, caption_columns=drawn, caption_weights=None)


def _require_captions_of(config: Stage2Recipe, cache: EmbeddingCache, source: CaptionSource) -> None:
    """Raise an error before training if the cache lacks captions of the training set; see [`require_captions`]."""
    batches = caption_batches(_drawn(source), config.process_index, config.world_size)
    known = [cache.contains(texts) for texts in batches]
    # Of all processes, so that all of them or none raise the error.
    counted = [sum(map(len, known)), sum(int((~has_row).sum()) for has_row in known)]
    total, missing = sum_over_processes(torch.tensor(counted)).tolist()
    require_captions(missing, total, cache, config.on_error, f"the training set {source.path}")


def _no_retrieval(captions: list[str]) -> Tensor:
    raise ValueError("the captions of a retrieval set need eval_embedding_cache.")
