"""Between the stages: embed every caption once with the frozen LLM (the cache that stage 2 reads)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.embedding import CacheManifest, build_embedding_cache
from llm2clip.utils.processes import process_state
from llm2clip.utils.settings import require
from llm2clip.utils.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPTextModel
from modeling_llm2clip.modeling_llm2clip_utils import encode_tokens, execution_device, tokenize_captions

logger = logging.getLogger(__name__)


@dataclass
class EmbedConfig:
    """Settings of the embedding cache."""

    text_model_name_or_path: str = field(default="", metadata={"help": "Text tower: Hub id or folder."})
    text_model_revision: str | None = field(default=None, metadata={"help": "Revision of its repo."})
    output_dir: str = field(default="", metadata={"help": "Folder of the cache."})
    sources: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "Data sets whose captions are embedded: CaptionSource mappings."}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Largest number of captions per forward pass; unset: as their tokens allow."}
    )
    dtype: str = field(default="float32", metadata={"help": "dtype in which the LLM runs."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa or flash_attention_2."})
    cache_dtype: str = field(default="float16", metadata={"help": "dtype of the cache: float16 or bfloat16."})
    normalize: bool = field(default=False, metadata={"help": "Store unit vectors."})
    shard_size: int = field(default=8192, metadata={"help": "Captions per file."})


def run(config: EmbedConfig) -> dict[str, Any]:
    """Build the cache; a run that was killed goes on where it stopped, and captions that are there are kept.

    With several processes (torchrun, accelerate) each embeds its own shards.

    Args:
        config: The settings.

    Returns:
        The number of captions, and of those that were longer than the encoder reads.
    """
    require(config, ["text_model_name_or_path", "sources"])
    # The processes do not talk while they work, and one may end hours before another.
    state = process_state(timeout=timedelta(days=7))
    model: Any
    in_float16 = config.dtype == "float16"
    model, tokenizer = open_text_tower(
        config.text_model_name_or_path,
        dtype="auto" if in_float16 else config.dtype,
        attn_implementation=config.attn_implementation,
        revision=config.text_model_revision,
    )
    if in_float16:
        # Rounded to float16, the weights no longer show whose they are.
        model.config.fingerprint = model.fingerprint()
        model.half()
    model.to(state.device).eval()
    captions = distinct_captions([CaptionSource.from_dict(source) for source in config.sources])
    manifest = embed_captions(
        model, tokenizer, captions, config.output_dir, config.text_model_name_or_path, config, state
    )
    return {"num_captions": manifest.num_captions, "num_truncated": manifest.num_truncated}


def embed_captions(
    model: LLM2CLIPTextModel,
    tokenizer: Any,
    captions: list[str],
    folder: str,
    name: str,
    config: EmbedConfig,
    state: PartialState,
) -> CacheManifest:
    """Embed captions with a text tower into a cache; see [`build_embedding_cache`].

    Args:
        model: The text tower.
        tokenizer: Its tokenizer.
        captions: Distinct captions.
        folder: The cache.
        name: The text tower's name, for messages.
        config: Batch size and format.
        state: The processes that share the work.

    Raises:
        ValueError: The text tower's weights cannot be read, so that the cache could not say whose it is.
    """
    if not model.has_readable_weights:
        raise ValueError(f"the weights of {name} are quantised or offloaded; embed with the plain weights.")
    fingerprint = model.identity()
    if fingerprint is None:
        raise ValueError(f"{name} in float16 does not show whose weights it has; load it in bfloat16 or float32.")
    text = model.config

    def embed(batch: list[str]) -> tuple[torch.Tensor, int]:
        tokens, num_truncated = tokenize_captions(batch, tokenizer, text.prompt_token_ids)
        rows = encode_tokens(
            tokens,
            tokenizer,
            lambda inputs: model(**inputs).pooler_output,
            device=execution_device(model),
            width=text.hidden_size,
            batch_size=config.batch_size,
        )
        return rows, num_truncated

    return build_embedding_cache(
        folder,
        captions,
        embed,
        fingerprint=fingerprint,
        text_model_name=name,
        hidden_size=text.hidden_size,
        pooling=text.pooling,
        prompt_prefix=text.prompt_prefix,
        prompt_suffix=text.prompt_suffix,
        max_length=text.max_text_length,
        text_model_dtype=str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        dtype=config.cache_dtype,
        normalize=config.normalize,
        shard_size=config.shard_size,
        rank=state.process_index,
        world_size=state.num_processes,
        barrier=state.wait_for_everyone,
    )
