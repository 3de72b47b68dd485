"""Opening the embedding cache of a model, after verifying that the model's text tower has made it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm2clip.command_line.processes import on_main_process
from llm2clip.data.shards import SourceShard
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.models.identity import tokenizer_fingerprint
from llm2clip.models.repos import OUR_MODELS, inspect_repo
from llm2clip.models.towers import describe_text_tower
from llm2clip.store import EmbeddingCache, PairedCache, StoreManifest, StoreMismatchError
from llm2clip.store.store import stored_manifest
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPTextConfig

logger = logging.getLogger(__name__)


def open_cache_of_model(
    path: str | Path | Sequence[str],
    config: LLM2CLIPConfig,
    tokenizer: Any,
    *,
    verify: bool = True,
) -> EmbeddingCache:
    """Open the embedding cache of a model, whose config records the fingerprint of its text tower.

    Args:
        path: The folder; of a model of the embeddings of two text encoders those of both, in their order.
        tokenizer: That of the text tower; such a model has none.

    Raises:
        StoreError: See [`EmbeddingCache.open`]. A model that records no fingerprint takes any cache.
        ValueError: There are not as many caches as the model has text encoders.
    """
    encoders, paths = config.text_config.encoders, [path] if isinstance(path, str | Path) else [*path]
    if len(paths) != len(encoders or [None]):
        raise ValueError(
            f"the model reads the embeddings of {len(encoders or [None])} text encoder(s), but the embedding caches "
            f"are {', '.join(map(str, paths))}; give one of each, in their order."
        )
    if not isinstance(path, str | Path):
        cache: EmbeddingCache = PairedCache.of_folders(path, verify)
        _refuse_other_encoder(cache.path, cache.manifest, config.text_model_fingerprint, None)
        return cache
    cache = EmbeddingCache.open(path, verify=False)
    refuse_other_text_tower(path, cache.manifest, config, tokenizer)
    if verify:
        cache.require_unchanged()
    return cache


def open_sidecars_of_model(
    folder: str | Path,
    shards: Sequence[SourceShard],
    columns: Sequence[str],
    config: LLM2CLIPConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> SourceSidecars:
    """Open the sidecars of a source for a model, see [`open_cache_of_model`], and check all their manifests.

    Args:
        shards, columns: The shards of the source, and the columns that captions are drawn from.

    Raises:
        StoreError, MissingCaptionError: See [`SourceSidecars.check`].
    """
    sidecars = SourceSidecars(folder, shards)
    sidecars.manifest, sidecars.row_counts = on_main_process(partial(sidecars.check, columns))
    refuse_other_text_tower(folder, sidecars.manifest, config, tokenizer)
    return sidecars


def _refuse_other_encoder(
    path: str | Path, manifest: StoreManifest, fingerprint: str | None, tokenizer_fingerprint: str | None
) -> None:
    """Raise a `StoreMismatchError` if another encoder or tokenizer made embeddings; None accepts any."""
    advice = "Use that {}, or embed the captions with this one into another folder (`llm2clip embed`)."
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise StoreMismatchError(
            f"The embedding cache {path} was made by {manifest.encoder} with fingerprint {manifest.fingerprint}, but "
            f"the text encoder in use has fingerprint {fingerprint}. {advice.format('encoder')}"
        )
    known = manifest.identity["tokenizer_fingerprint"]
    if known is not None and tokenizer_fingerprint is not None and known != tokenizer_fingerprint:
        raise StoreMismatchError(
            f"The embedding cache {path} was made with the tokenizer {known} of {manifest.encoder}, but the tokenizer "
            f"in use is {tokenizer_fingerprint}: other vocabulary, merges, normaliser, added tokens or prompt. "
            f"{advice.format('tokenizer')}"
        )


def refuse_other_text_tower(
    path: str | Path, manifest: StoreManifest, config: LLM2CLIPConfig, tokenizer: Any = None
) -> None:
    """Raise a `StoreMismatchError` if captions were embedded by another text tower or tokenizer, or another prompt.

    What is not known, of a model in memory, is not compared.
    """
    known = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
    _refuse_other_encoder(path, manifest, config.text_model_fingerprint, known)
    made_with, prompt = manifest.identity["prompt_prefix"], config.text_config.prompt_prefix
    if made_with != prompt:
        raise StoreMismatchError(
            f"the captions of {path} were embedded after {made_with!r}, but the model reads them after {prompt!r}: "
            "its encode_text would give other vectors. Embed them without --instruction; a plain LLM or embedding "
            "model can have the instruction as --prompt-prefix, which the model keeps."
        )


def describe_text_tower_of_cache(
    name: str, revision: str | None, path: str | Path | None
) -> tuple[LLM2CLIPTextConfig, PreTrainedTokenizerBase]:
    """Describe a text tower as [`describe_text_tower`] does; a plain LLM with the prompt that a cache was made with.

    Args:
        path: The cache, if there is one. Its prompt is taken only if that gives the tokenizer that the cache records,
            which an instruction or another LLM does not.
    """
    described = describe_text_tower(name, revision)
    if path is None or inspect_repo(name, revision).kind in OUR_MODELS:
        return described
    made_by = stored_manifest(path).identity
    if made_by["tokenizer_fingerprint"] in (None, tokenizer_fingerprint(described[1])):
        return described
    prompt = {name: made_by[name] for name in ("prompt_prefix", "prompt_suffix")}
    prompted = describe_text_tower(name, revision, **prompt)
    if tokenizer_fingerprint(prompted[1]) != made_by["tokenizer_fingerprint"]:
        return described
    logger.info("Prompt of %s, from the embedding cache: %r caption %r.", name, *prompt.values())
    return prompted
