"""The `llm2clip embed` command: embed every caption once, between the stages, for stage 2 to read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from accelerate import PartialState

from llm2clip.command_line.processes import process_state, sum_over_processes
from llm2clip.command_line.settings import check_choices, refuse, require, setting
from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.encoders.embed_shards import (
    EmbedCounts,
    EmbedShard,
    SidecarJob,
    count_shards,
    embed_shard,
    embed_shards,
    list_jobs,
    parse_part,
)
from llm2clip.encoders.ours import OurEncoder
from llm2clip.encoders.ray_engine import embed_with_ray
from llm2clip.files.locks import run_lock
from llm2clip.models.identity import tokenizer_fingerprint
from llm2clip.models.towers import open_text_tower
from llm2clip.store import EmbeddingCache, StoreManifest, build_embedding_cache, caption_manifest
from llm2clip.store.manifest import StoredDtype

REQUIRED = ["text_model_name_or_path", "sources"]
# Settings that a run has no use for, if it writes the other kind of store or has another engine.
FOR_CACHES = ("shard_size",)
FOR_SIDECARS = ("shard_slice", "reuse_cache", "engine")
FOR_RAY = ("ray_address", "ray_actors", "ray_gpus_per_actor")


@dataclass
class EmbedConfig:
    """Settings of the embedding cache."""

    text_model_name_or_path: str = setting(
        "", "Text tower, plain LLM, encoder, or embedding model of sentence-transformers: Hub id or folder."
    )
    text_model_revision: str | None = setting(None, "Branch, tag or commit of the text tower on the Hub.")
    output_dir: str = setting(
        "",
        "Folder of the cache, or of the sidecars: a URL, such as s3://bucket/folder, or beside their shards if unset.",
    )
    sources: list[dict[str, Any]] = setting(
        [],
        "Data sets whose captions are embedded: mappings with the fields of CaptionSource. Their weights and "
        "caption_weights, by which stage 2 draws, make no difference here.",
    )
    store: Literal["auto", "cache", "sidecars"] = setting(
        "auto",
        "cache: one folder that finds each caption by its text, for up to a few million; sidecars: a file of "
        "embeddings for each file of a streamed source, for data of any size, since no process holds more than one "
        "shard; auto: sidecars if all sources have streaming: true and no max_samples, otherwise the cache.",
    )
    shard_slice: str | None = setting(
        None, "Embed only the i-th of n parts of the shards: i/n, such as 0/8, for the jobs of an array. For sidecars."
    )
    engine: Literal["processes", "ray"] = setting(
        "processes",
        "Who embeds the shards: the processes of this launch (one, or those of torchrun), or actors on a Ray cluster, "
        "which Ray restarts when they or their nodes die. For sidecars.",
    )
    ray_address: str | None = setting(
        None, "Address of a running Ray cluster, such as auto or 10.0.0.1:6379; unset: Ray is started on this machine."
    )
    ray_actors: int | None = setting(
        None,
        "Largest number of Ray actors; unset: as many as the cluster has room for, also on nodes that join later.",
    )
    ray_gpus_per_actor: float | None = setting(
        None, "GPUs of a Ray actor, besides one core; unset: 1 on a cluster that has GPUs, otherwise 0."
    )
    reuse_cache: str | None = setting(
        None,
        "Embedding cache or folder of sidecars of the same text tower, whose embeddings are copied into sidecars "
        "instead of computed.",
    )
    prompt_prefix: str | None = setting(
        None,
        "Text before every caption, for a plain LLM or embedding model; unset: the original's for the name of the "
        "LLM, or the default prompt of the embedding model, if any.",
    )
    prompt_suffix: str | None = setting(None, "Text after every caption, for a plain LLM; unset: as prompt_prefix.")
    instruction: str | None = setting(
        None,
        "Text between prompt and caption, which is not pooled unless the prompt is; pass the same one to "
        "encode_text() later. Stage 2 refuses such embeddings: its models have no instruction.",
    )
    batch_size: int | None = setting(
        None,
        "Largest number of captions per forward pass; lower it when memory runs out. By default the number of tokens "
        "is the only limit.",
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = setting(
        "float32", "dtype in which the LLM computes; auto is that of its weights."
    )
    attn_implementation: str | None = setting(
        None, "Attention of the LLM: eager, sdpa, flash_attention_2 or flex_attention."
    )
    cache_dtype: StoredDtype = setting(
        "float16",
        "dtype of the stored embeddings; bfloat16 if they exceed the range of float16; float32 is exact.",
    )
    normalize: bool = setting(False, "Store embeddings of unit length.")
    shard_size: int = setting(8192, "Captions per file of a cache; a killed run loses at most one file.")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.ray_actors is not None and self.ray_actors < 1:
            raise ValueError(f"ray_actors must be at least 1, not {self.ray_actors}.")

    @property
    def writes_sidecars(self) -> bool:
        """Whether embeddings lie in a sidecar for each shard; see `store`."""
        sources = [CaptionSource.from_dict(source) for source in self.sources]
        streamed = bool(sources) and all(source.streaming and source.max_samples is None for source in sources)
        return self.store == "sidecars" or (self.store == "auto" and streamed)


def run(config: EmbedConfig) -> dict[str, Any]:
    """Embed all captions. An interrupted run continues where it stopped, and what is embedded is kept.

    With several processes (torchrun, accelerate) each embeds its own shards.

    Returns:
        The number of captions, and of those that were truncated; of sidecars also the number of shards.

    Raises:
        ValueError: Settings do not fit each other, or shards could not be embedded.
    """
    kind = f"sidecars (engine: {config.engine})" if config.writes_sidecars else "a cache"
    unused = [*(FOR_CACHES if config.writes_sidecars else FOR_SIDECARS), *(() if config.engine == "ray" else FOR_RAY)]
    refuse(config, unused, f"a run that writes {kind} does not use it: change store or engine")
    if config.writes_sidecars:
        # Without a lock: several runs may share a folder, and each sidecar appears whole.
        return _embed_into_sidecars(config)
    if "://" in config.output_dir:
        raise ValueError(f"a cache is a local folder, not {config.output_dir}; sidecars may have a URL.")
    with run_lock(config.output_dir):
        return _embed_into_cache(config)


def _embed_into_cache(config: EmbedConfig) -> dict[str, Any]:
    require(config, REQUIRED)
    encoder = _open_encoder(config)
    sources = [CaptionSource.from_dict(source) for source in config.sources]
    captions = distinct_captions(sources, in_all_processes=True)
    name = config.text_model_name_or_path
    manifest = embed_into_cache(captions, encoder, config.output_dir, name, config)
    return {"num_captions": manifest.rows, "num_truncated": manifest.counts["truncated"]}


def _embed_into_sidecars(config: EmbedConfig) -> dict[str, Any]:
    require(config, REQUIRED, output_dir=False)
    sources = [CaptionSource.from_dict(source) for source in config.sources]
    jobs = list_jobs(sources, config.output_dir or None, parse_part(config.shard_slice))
    counts = _embed_on_ray(config, jobs) if config.engine == "ray" else _embed_in_processes(config, jobs)
    # All processes have ended before one of them reports.
    total = sum_over_processes(
        torch.tensor([counts.shards, counts.done_before, counts.captions, counts.truncated, counts.reused])
    ).tolist()
    failed = int(sum_over_processes(torch.tensor([len(counts.failed)])))
    if failed:
        shown = "; ".join(counts.failed[:3]) or "see the messages of the other processes"
        raise ValueError(f"{failed} of {total[0]} shards could not be embedded, the others are done: {shown}")
    names = ("num_shards", "num_shards_done_before", "num_captions", "num_truncated", "num_reused")
    return dict(zip(names, total, strict=True))


def _embed_in_processes(config: EmbedConfig, jobs: list[SidecarJob]) -> EmbedCounts:
    state = _long_lived_processes()
    mine = jobs[state.process_index :: state.num_processes]
    return embed_shards(mine, open_shard_embedder(config), show_progress_bar=state.is_main_process)


def _embed_on_ray(config: EmbedConfig, jobs: list[SidecarJob]) -> EmbedCounts:
    if process_state().num_processes > 1:
        raise ValueError("engine: ray is started as one process, which gives the work to Ray; leave torchrun out.")
    options = config.ray_address, config.ray_actors, config.ray_gpus_per_actor
    return count_shards(embed_with_ray(jobs, partial(open_shard_embedder, config), *options), len(jobs))


def open_shard_embedder(config: EmbedConfig) -> EmbedShard:
    """Open the text tower of a run, and the embeddings that it copies."""
    encoder = _open_encoder(config)
    return partial(
        embed_shard,
        embed=partial(encoder.embed, batch_size=config.batch_size, instruction=config.instruction),
        encoder=describe_encoder(encoder, config.text_model_name_or_path, config),
        reused=None if config.reuse_cache is None else EmbeddingCache.open(config.reuse_cache),
    )


def _long_lived_processes() -> PartialState:
    # Processes only synchronise at the start and the end, and one may finish hours before another.
    return process_state(timeout=timedelta(days=7))


def _open_encoder(config: EmbedConfig) -> OurEncoder:
    device = _long_lived_processes().device
    model: Any
    in_float16 = config.dtype == "float16"
    model, tokenizer = open_text_tower(
        config.text_model_name_or_path,
        dtype="auto" if in_float16 else config.dtype,
        attn_implementation=config.attn_implementation,
        revision=config.text_model_revision,
        prompt_prefix=config.prompt_prefix,
        prompt_suffix=config.prompt_suffix,
    )
    if in_float16:
        # The fingerprint is not defined for weights that were rounded to float16.
        model.config.fingerprint = model.config.fingerprint or model.fingerprint()
        model.half()
    return OurEncoder(model.to(device).eval(), tokenizer)


def embed_into_cache(
    captions: list[str], encoder: OurEncoder, folder: str, name: str, config: EmbedConfig
) -> StoreManifest:
    """Embed captions with a text tower into a cache; see [`build_embedding_cache`].

    Args:
        captions: Distinct captions.
        encoder, name: The text tower, and its name in messages.
        config: Batch size and format.

    Raises:
        ValueError: The weights of the text tower cannot be identified, which the cache has to record.
    """
    return build_embedding_cache(
        folder,
        captions,
        partial(encoder.embed, batch_size=config.batch_size, instruction=config.instruction),
        describe_encoder(encoder, name, config),
        shard_size=config.shard_size,
        processes=process_state(),
    )


def describe_encoder(encoder: OurEncoder, name: str, config: EmbedConfig) -> StoreManifest:
    """Describe a text tower and the format of its embeddings.

    Raises:
        ValueError: The weights of the text tower cannot be identified.
    """
    model = encoder.model
    if not model.has_readable_weights:
        raise ValueError(f"the weights of {name} are quantised or offloaded; embed with the plain weights.")
    fingerprint = model.identity()
    if fingerprint is None:
        raise ValueError(f"the weights of {name} cannot be identified in float16; load it in bfloat16 or float32.")
    text = model.config
    return caption_manifest(
        name,
        fingerprint,
        width=text.hidden_size,
        pooling=text.pooling,
        prompt_prefix=text.prompt_prefix + (config.instruction or ""),
        prompt_suffix=text.prompt_suffix,
        max_length=text.max_text_length,
        tokenizer_fingerprint=tokenizer_fingerprint(encoder.tokenizer),
        text_model_dtype=str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        dtype=config.cache_dtype,
        normalize=config.normalize,
    )
