"""Opening the embedding cache of a model, after verifying that the model's text tower has made it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip.models.identity import tokenizer_fingerprint
from llm2clip.store import EmbeddingCache, PairedCache, StoreManifest, StoreMismatchError
from modeling_llm2clip import LLM2CLIPConfig


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
    number, paths = len(config.text_config.encoders or [None]), [path] if isinstance(path, str | Path) else [*path]
    if len(paths) != number:
        raise ValueError(
            f"the model reads the embeddings of {number} text encoder(s), but the embedding caches are "
            f"{', '.join(map(str, paths))}; give one of each, in their order."
        )
    cache: EmbeddingCache = (
        EmbeddingCache.open(paths[0], verify=False) if number == 1 else PairedCache.of_folders(paths, verify=False)
    )
    refuse_other_text_tower(cache.path, cache.manifest, config, tokenizer)
    if verify:
        cache.require_unchanged()
    return cache


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
