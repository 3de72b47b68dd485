"""Where the caption embeddings of stage 2 come from: a cache, sidecars beside the shards of a stream, or the LLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from torch import Tensor

from llm2clip.data import CaptionSource, caption_batches
from llm2clip.data.shards import ShardedSource
from llm2clip.embedding import CacheManifest, CaptionEmbedder, EmbeddingCache, MissingCaptionError
from llm2clip.embedding.cache_of_model import open_cache_of_model, open_sidecars_of_model
from llm2clip.embedding.sidecars import SourceSidecars, is_sidecar_folder
from llm2clip.evaluation import ImageTextRetrieval
from llm2clip.trainers.stage2_config import Stage2Config
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor


@dataclass(frozen=True)
class Stage2Captions:
    """The caption embeddings of a run.

    Attributes:
        embed: Maps captions of retrieval sets to the embeddings of the LLM.
        cache: The cache of the training set, if there is one.
        sidecars: The sidecars of the training set, if there are any.
    """

    embed: Callable[[list[str]], Tensor]
    cache: EmbeddingCache | None = None
    sidecars: SourceSidecars | None = None

    def require_cache(self) -> EmbeddingCache:
        """Return the cache.

        Raises:
            ValueError: The embeddings are in sidecars.
        """
        if self.cache is None:
            raise ValueError("frozen towers read a random-access cache; embed the captions with store: cache.")
        return self.cache


def open_captions(
    config: Stage2Config,
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    retrieval: Mapping[str, ImageTextRetrieval],
) -> Stage2Captions:
    """Open the caption embeddings of a run.

    Raises:
        CacheError: They were made by another encoder, or are incomplete or damaged.
        MissingCaptionError: They lack captions of a retrieval set or of the training set.
    """
    if config.embedding_cache is None:
        embedder = CaptionEmbedder(model.text_model, processor)
        return Stage2Captions(partial(embedder.embed, show_progress_bar=False))
    if not is_sidecar_folder(config.embedding_cache):
        cache = _open_cache(config, config.embedding_cache, model, processor, retrieval)
        if config.verify_cache:
            cache.check_finite(config.process_index, config.world_size)
            for source in map(CaptionSource.from_dict, config.sources):
                if not source.streaming:
                    _refuse_missing_captions(cache, source, config.process_index, config.world_size)
        return Stage2Captions(cache.lookup, cache)
    sidecars = _open_sidecars(config, model, processor)
    if config.eval_embedding_cache is not None:
        measured = _open_cache(config, config.eval_embedding_cache, model, processor, retrieval)
        return Stage2Captions(measured.lookup, sidecars=sidecars)
    if retrieval:
        raise ValueError(
            f"{config.embedding_cache} contains sidecars, which only a stream reads. Embed the captions of "
            "eval_sources into a cache (`llm2clip embed`, store: cache), and set eval_embedding_cache to it."
        )
    return Stage2Captions(_no_retrieval, sidecars=sidecars)


def _open_cache(
    config: Stage2Config,
    path: str,
    model: LLM2CLIPModel,
    processor: LLM2CLIPProcessor,
    retrieval: Mapping[str, ImageTextRetrieval],
) -> EmbeddingCache:
    """Open a cache that contains the captions of the retrieval sets."""
    is_trained = config.model_name_or_path is not None
    model_config = cast(LLM2CLIPConfig, model.config)
    cache = open_cache_of_model(path, model_config, processor.tokenizer, is_trained=is_trained, verify=False)
    _refuse_other_width(path, cache.manifest, model)
    for name, measured in retrieval.items():
        missing = (~cache.contains(measured.captions)).sum()
        if missing:
            raise MissingCaptionError(
                f"the cache {path} lacks {missing} of the {len(measured.captions)} captions of eval_sources {name!r}; "
                "run `llm2clip embed` on that source too."
            )
    return cache


def _open_sidecars(config: Stage2Config, model: LLM2CLIPModel, processor: LLM2CLIPProcessor) -> SourceSidecars:
    sources = [CaptionSource.from_dict(source) for source in config.sources]
    if len(sources) != 1 or not sources[0].streaming:
        raise ValueError(
            f"{config.embedding_cache} contains sidecars, which a single source with streaming: true reads. Embed "
            "other sources with store: cache."
        )
    source = _drawn(sources[0])
    folder, shards = str(config.embedding_cache), ShardedSource(source).shards
    model_config = cast(LLM2CLIPConfig, model.config)
    sidecars = open_sidecars_of_model(
        folder,
        shards,
        source.caption_columns,
        model_config,
        processor.tokenizer,
        is_trained=config.model_name_or_path is not None,
    )
    _refuse_other_width(folder, sidecars.open(0).manifest, model)
    return sidecars


def _refuse_other_width(path: str, manifest: CacheManifest, model: LLM2CLIPModel) -> None:
    width = model.config.text_config.hidden_size
    if manifest.hidden_size != width:
        raise ValueError(
            f"the cache {path} contains embeddings of width {manifest.hidden_size} (of {manifest.text_model_name}), "
            f"but {model.config.text_model_name_or_path} gives {width}; embed the captions with that text tower."
        )


def _drawn(source: CaptionSource) -> CaptionSource:
    """Return a source with the caption columns that training draws from."""
    if source.caption_weights is None:
        return source
    drawn = [name for name, weight in zip(source.caption_columns, source.caption_weights, strict=True) if weight]
    return replace(source, caption_columns=drawn, caption_weights=None)


def _refuse_missing_captions(cache: EmbeddingCache, source: CaptionSource, rank: int, world_size: int) -> None:
    """Raise an error before training if the cache lacks captions of this rank's part of the training set."""
    batches = caption_batches(_drawn(source), rank, world_size)
    missing = sum(int((~cache.contains(texts)).sum()) for texts in batches)
    if missing:
        raise MissingCaptionError(
            f"the cache {cache.path} lacks {missing} captions of the training set {source.path}; run `llm2clip embed` "
            "on it."
        )


def _no_retrieval(captions: list[str]) -> Tensor:
    raise ValueError("the captions of a retrieval set need eval_embedding_cache.")
