"""Opening the embedding cache of a model, after verifying that the model's text tower has made it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm2clip.data.shards import SourceShard
from llm2clip.data.sidecars import SourceSidecars
from llm2clip.store import EmbeddingCache, PairedCache, StoreManifest, StoreMismatchError
from llm2clip.store.manifest import refuse_other_encoder
from llm2clip.store.store import stored_manifest
from llm2clip.utils.processes import on_main_process
from llm2clip.utils.repos import OUR_MODELS, inspect_repo
from llm2clip.utils.text_identity import read_fingerprint, tokenizer_fingerprint
from llm2clip.utils.towers import describe_text_tower, each_of_pair, pair_description
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPTextConfig
from modeling_llm2clip.identity_llm2clip import changed_settings

logger = logging.getLogger(__name__)


def open_cache_of_model(
    path: str | Path | Sequence[str],
    config: LLM2CLIPConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_trained: bool,
    verify: bool = True,
) -> EmbeddingCache:
    """Open the embedding cache of a model, whose config records the fingerprint of its text tower.

    The record is compared first. Where it differs and the adapter is not trained, one process reads the weights of the
    tower: an adapter on weights of another dtype may have recorded another one. The config is updated.

    Args:
        path: The folder; of two text encoders those of both, in their order.
        is_trained: Whether the model's adapter was trained with the recorded tower, and fits no other.

    Raises:
        StoreError: See [`EmbeddingCache.open`]. A model that records no fingerprint takes any cache.
        ValueError: There are not as many caches as text encoders.
    """
    if not isinstance(path, str | Path):
        halves = _halves(config, tokenizer)
        _require_as_many(path, len(halves))
        first, second = (
            open_cache_of_model(folder, half, half_tokenizer, is_trained=is_trained, verify=verify)
            for folder, (half, half_tokenizer) in zip(path, halves, strict=True)
        )
        cache: EmbeddingCache = PairedCache(first, second)
        refuse_other_encoder(cache.path, cache.manifest, config.text_model_fingerprint, None)
        return cache
    cache = EmbeddingCache.open(path, verify=False)
    expected = check_encoder(path, cache.manifest, config, is_trained)
    refuse_other_encoder(path, cache.manifest, expected, tokenizer_fingerprint(tokenizer))
    if verify:
        cache.require_unchanged()
    return cache


def _require_as_many(caches: Sequence[str], encoders: int) -> None:
    if len(caches) != encoders:
        raise ValueError(
            f"{len(caches)} embedding caches are given, {', '.join(caches)}, but the model has {encoders} text "
            "encoder(s); give one of each, in their order."
        )


def _halves(config: LLM2CLIPConfig, tokenizer: Any) -> list[tuple[LLM2CLIPConfig, Any]]:
    """Return the config and the tokenizer of a model as if it had one of its text encoders."""
    text_configs, name = config.text_config.halves(), config.text_model_name_or_path
    towers: list[Any] = [(name, None)] * len(text_configs)
    if name is not None and not isinstance(name, str):
        towers = each_of_pair(name, config.text_model_revision)
    configs = []
    for text_config, tower in zip(text_configs, towers, strict=True):
        half = copy.copy(config)
        half.text_config, half.text_model_fingerprint = text_config, text_config.fingerprint
        half.text_model_name_or_path, half.text_model_revision = tower
        configs.append(half)
    return list(zip(configs, getattr(tokenizer, "parts", [tokenizer]), strict=True))


def open_sidecars_of_model(
    folder: str | Path,
    shards: Sequence[SourceShard],
    columns: Sequence[str],
    config: LLM2CLIPConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_trained: bool,
) -> SourceSidecars:
    """Open the sidecars of a source for a model, see [`open_cache_of_model`], and check all their manifests.

    Args:
        shards, columns: The shards of the source, and the columns that captions are drawn from.

    Raises:
        StoreError, MissingCaptionError: See [`SourceSidecars.check`].
    """
    encoder, row_counts = on_main_process(partial(SourceSidecars(folder, shards).check, columns))
    expected = check_encoder(folder, encoder, config, is_trained)
    refuse_other_encoder(Path(folder), encoder, expected, tokenizer_fingerprint(tokenizer))
    return SourceSidecars(folder, shards, row_counts)


def check_encoder(path: str | Path, manifest: StoreManifest, config: LLM2CLIPConfig, is_trained: bool) -> str | None:
    """Return the fingerprint that embeddings must have for a model, or None if they fit; see `open_cache_of_model`.

    Raises:
        StoreMismatchError: There was an instruction before the captions.
    """
    made_by = manifest.fingerprint
    recorded = config.text_model_fingerprint
    fits = recorded in (None, made_by)
    if not fits and not is_trained:
        present = on_main_process(partial(_read, config))
        config.text_model_fingerprint = recorded = present or recorded
        fits = made_by == present
    if fits:
        refuse_other_prompt(path, manifest, config)
        warn_of_settings(path, manifest, config.text_config)
    return None if fits else recorded


def warn_of_settings(path: str | Path, manifest: StoreManifest, config: LLM2CLIPTextConfig) -> None:
    """Warn if the text model that made embeddings had the weights of this one, but other settings."""
    if manifest.settings and (
        changed := changed_settings(manifest.settings, config.decoder_config, config.bidirectional)
    ):
        logger.warning("%s was made by a text model with other settings; this one has %s.", path, ", ".join(changed))


def refuse_other_prompt(path: str | Path, manifest: StoreManifest, config: LLM2CLIPConfig) -> None:
    """Raise a `StoreMismatchError` if captions were embedded after another prompt than the model reads them after."""
    made_with, prompt = manifest.identity["prompt_prefix"], config.text_config.prompt_prefix
    if made_with != prompt:
        raise StoreMismatchError(
            f"the captions of {path} were embedded after {made_with!r}, but the model reads them after {prompt!r}: "
            "its encode_text would give other vectors. Embed them without --instruction; a plain LLM or embedding "
            "model can have the instruction as --prompt-prefix, which the model keeps."
        )


def describe_text_tower_of_cache(
    name: str | Sequence[str], revision: Any, path: str | Path | Sequence[str] | None
) -> tuple[LLM2CLIPTextConfig, PreTrainedTokenizerBase]:
    """Describe a text tower as [`describe_text_tower`] does; a plain LLM with the prompt that a cache was made with.

    Args:
        path: The cache, if there is one. Its prompt is taken only if that gives the tokenizer that the cache records,
            which an instruction or another LLM does not.
    """
    if not isinstance(name, str):
        towers = each_of_pair(name, revision)
        paths: list[Any] = [None] * len(towers)
        if path is not None and not isinstance(path, str | Path):
            paths = list(path)
            _require_as_many(paths, len(towers))
        halves = [describe_text_tower_of_cache(*tower, cache) for tower, cache in zip(towers, paths, strict=True)]
        return pair_description(*halves)
    if path is not None and not isinstance(path, str | Path):
        _require_as_many(path, 1)
        (path,) = path
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


def _read(config: LLM2CLIPConfig) -> str | None:
    name = config.text_model_name_or_path
    if name is None:
        return None
    try:
        return read_fingerprint(name, config.text_model_revision, config.text_config)
    except OSError as error:
        logger.warning("the weights of %s cannot be read to verify the embedding cache: %s", name, error)
        return None
