"""Building an embedding cache: each distinct caption once, in shards that survive a kill."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from safetensors.torch import save_file

from llm2clip.data.records import caption_keys
from llm2clip.embedding.cache import KeyIndex
from llm2clip.embedding.cache_files import (
    ACCEPTED_EARLIER,
    IDENTITY,
    MANIFEST,
    TWO_RULES,
    CacheDamagedError,
    CacheDtype,
    CacheManifest,
    CacheMismatchError,
    open_shard,
    shard_name,
)
from llm2clip.utils.files import atomic_path
from llm2clip.utils.progress import ProgressBar, progress_bar
from modeling_llm2clip.identity_llm2clip import is_earlier_rule
from modeling_llm2clip.modeling_llm2clip_utils import apply_umask

logger = logging.getLogger(__name__)

# Captions to their embeddings, and how many of them were truncated.
Embed = Callable[[list[str]], tuple[torch.Tensor, int]]


def build_embedding_cache(
    path: str | Path,
    captions: Sequence[str],
    embed: Embed,
    manifest: CacheManifest,
    *,
    embed_size: int = 1024,
    show_progress_bar: bool = True,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
    earlier_fingerprint: Callable[[], str | None] | None = None,
) -> CacheManifest:
    """Embed captions into a cache; resume an interrupted build, or append to a complete cache what it lacks.

    The captions are cut into shards in the given order. A shard is written under a temporary name, flushed to disk
    and renamed: it is complete or absent. Existing shards are kept, and the result equals that of an uninterrupted
    build. The missing shards are distributed over the ranks. Only one build may run in a folder at a time.

    Args:
        path: The folder, created if it does not exist.
        captions: Distinct captions, the same on every rank.
        embed: Maps n captions to (n, hidden_size) finite numbers and the number of captions that exceed `max_length`.
        manifest: The text encoder and the format of the cache. A build that is resumed keeps its `shard_size`.
        embed_size: Captions per call of `embed`, which can sort them by length.
        show_progress_bar: Show a progress bar on rank 0.
        rank, world_size: Rank of this process, and number of processes.
        barrier: Waits for all processes; required when there are several.
        earlier_fingerprint: Computes what verifies a cache of an earlier release; it is continued with a warning.

    Returns:
        The manifest of the complete cache.

    Raises:
        CacheMismatchError: The folder contains the cache of another encoder, or an unfinished one of other captions.
        ValueError: There are no captions or they repeat, or an embedding has the wrong shape, is not finite or exceeds
            float16.
    """
    if world_size > 1 and barrier is None:
        raise ValueError("Several processes need a barrier, such as torch.distributed.barrier.")
    wait = barrier or (lambda: None)
    keys = _distinct_keys(captions)
    folder = Path(path)
    manifest, work = _plan(folder, replace(manifest, shards=[]), keys, earlier_fingerprint)
    _start(folder, manifest, bool(work), rank, wait)
    mine = dict(list(work.items())[rank::world_size])
    total = sum(map(len, mine.values()))
    with progress_bar("Embedding captions", total, "caption", show_progress_bar and rank == 0 and total > 0) as bar:
        for number, rows in mine.items():
            vectors, truncated = _embed_shard([captions[row] for row in rows], embed, manifest, embed_size, bar)
            tensors = {"embeddings": vectors, "keys": torch.from_numpy(keys[rows])}
            with atomic_path(folder / shard_name(number)) as temporary:
                # A single entry of metadata: safetensors does not write several in a fixed order.
                save_file(tensors, temporary, {"num_truncated": str(truncated)})
                apply_umask(temporary)
    wait()
    if rank == 0 and (work or manifest.status != "complete"):
        _finish(folder, manifest)
    wait()
    return CacheManifest.read(folder)


def _start(folder: Path, manifest: CacheManifest, has_work: bool, rank: int, wait: Callable[[], None]) -> None:
    """Write the manifest of an unfinished build, and check that all ranks have the same captions."""
    wait()  # every rank has read the folder before rank 0 changes it
    if rank == 0 and has_work:
        manifest.status = "building"
        manifest.write(folder)
    wait()
    if CacheManifest.read(folder).plan_digest != manifest.plan_digest:
        raise CacheMismatchError(f"Rank {rank} was given other captions than rank 0 for {folder}.")
    if not has_work:
        logger.info("The embedding cache %s already contains all these captions.", folder)


def _embed_shard(
    captions: list[str], embed: Embed, manifest: CacheManifest, embed_size: int, bar: ProgressBar
) -> tuple[torch.Tensor, int]:
    vectors = torch.empty((len(captions), manifest.hidden_size), dtype=getattr(torch, manifest.dtype))
    truncated = 0
    for start in range(0, len(captions), embed_size):
        texts = captions[start : start + embed_size]
        embeddings, cut = embed(texts)
        vectors[start : start + len(texts)] = _checked(embeddings, texts, manifest)
        truncated += cut
        bar.update(advance=len(texts))
    return vectors, truncated


def _distinct_keys(captions: Sequence[str]) -> np.ndarray:
    if not captions:
        raise ValueError("There are no captions to embed.")
    keys = caption_keys(captions)
    _, first, counts = np.unique(keys, axis=0, return_index=True, return_counts=True)
    if len(first) != len(keys):
        raise ValueError(
            f"{len(keys) - len(first)} captions repeat an earlier one, such as "
            f"{captions[int(first[counts > 1][0])][:80]!r}; pass distinct captions, as distinct_captions returns them."
        )
    return keys


def _digest(keys: list[np.ndarray]) -> str:
    return hashlib.blake2b(np.concatenate(keys).astype("<i8").tobytes(), digest_size=16).hexdigest()


def _plan(
    folder: Path,
    manifest: CacheManifest,
    keys: np.ndarray,
    earlier_fingerprint: Callable[[], str | None] | None,
) -> tuple[CacheManifest, dict[int, np.ndarray]]:
    """Return the manifest to follow, and the captions (positions in `keys`) of each shard to compute."""
    if manifest.dtype not in get_args(CacheDtype):
        choices = " or ".join(map(repr, get_args(CacheDtype)))
        raise ValueError(f"The dtype of a cache must be {choices}, not {manifest.dtype!r}.")
    if (folder / MANIFEST).is_file():
        manifest = _manifest_to_continue(folder, manifest, earlier_fingerprint)
    there = _existing_keys(folder, manifest)
    known = KeyIndex(np.concatenate([np.empty((0, 2), np.int64), *there.values()]))
    missing = np.flatnonzero(known.find(keys) < 0)
    absent = [number for number in range(len(manifest.shards)) if number not in there]
    if absent:
        # The absent shards contain, in order, what the others lack; the digest confirms the captions.
        bounds = np.cumsum([manifest.shards[number] for number in absent])
        work = dict(zip(absent, np.split(missing, bounds[:-1]), strict=True))
        filled = [there[number] if number in there else keys[work[number]] for number in range(len(manifest.shards))]
        if len(missing) != bounds[-1] or _digest(filled) != manifest.plan_digest:
            raise CacheMismatchError(
                f"The embedding cache {folder} lacks {len(absent)} of the {len(manifest.shards)} shards planned for "
                f"its {manifest.num_captions} captions, and these {len(keys)} captions are not the same ones. Finish "
                "the build with the captions that it was started with, or delete the folder."
            )
        return manifest, work
    parts = [missing[start : start + manifest.shard_size] for start in range(0, len(missing), manifest.shard_size)]
    work = dict(enumerate(parts, len(manifest.shards)))
    manifest.shards += map(len, parts)
    manifest.plan_digest = _digest([*there.values(), keys[missing]])
    return manifest, work


def _manifest_to_continue(
    folder: Path, new: CacheManifest, earlier_fingerprint: Callable[[], str | None] | None
) -> CacheManifest:
    old = CacheManifest.read(folder)
    names: tuple[str, ...] = IDENTITY
    rule = earlier_fingerprint if is_earlier_rule(old.fingerprint) else None
    if rule is not None and old.fingerprint == rule():
        logger.warning("The embedding cache %s %s", folder, ACCEPTED_EARLIER)
        names = tuple(name for name in IDENTITY if "fingerprint" not in name)
    for name in names:
        if getattr(old, name) != getattr(new, name):
            earlier = TWO_RULES if name == "fingerprint" and is_earlier_rule(old.fingerprint) else ""
            raise CacheMismatchError(
                f"The embedding cache {folder} was made by {old.text_model_name} with {name} {getattr(old, name)!r}, "
                f"but this build has {name} {getattr(new, name)!r} ({new.text_model_name}).{earlier} Choose another "
                "folder, or delete this one to embed again."
            )
    return old


def _existing_keys(folder: Path, manifest: CacheManifest) -> dict[int, np.ndarray]:
    there = {}
    for number in range(len(manifest.shards)):
        if (folder / shard_name(number)).exists():
            try:
                there[number] = open_shard(folder, manifest, number).keys()
            except CacheDamagedError as error:
                logger.warning("%s It is computed again.", error)
    return there


def _checked(vectors: torch.Tensor, texts: list[str], manifest: CacheManifest) -> torch.Tensor:
    vectors = vectors.detach().float().cpu()
    expected = (len(texts), manifest.hidden_size)
    if tuple(vectors.shape) != expected:
        raise ValueError(
            f"{manifest.text_model_name} returned embeddings of shape {tuple(vectors.shape)} instead of {expected}."
        )
    _refuse(~torch.isfinite(vectors), texts, "is not finite")
    if manifest.normalize:
        lengths = vectors.norm(dim=-1, keepdim=True)
        _refuse(lengths == 0, texts, "is zero, which has no direction")
        vectors = vectors / lengths
    stored = getattr(torch, manifest.dtype)
    fault = f"exceeds the range of {manifest.dtype}; use bfloat16 or normalize the embeddings"
    _refuse(vectors.abs() > torch.finfo(stored).max, texts, fault)
    return vectors.to(stored)


def _refuse(bad: torch.Tensor, texts: list[str], fault: str) -> None:
    rows = bad.any(dim=-1).nonzero()
    if len(rows):
        raise ValueError(f"The embedding of the caption {texts[int(rows[0])][:200]!r} {fault}.")


def _finish(folder: Path, manifest: CacheManifest) -> None:
    shards = [open_shard(folder, manifest, number) for number in range(len(manifest.shards))]
    manifest.num_truncated = sum(int(shard.metadata["num_truncated"]) for shard in shards)
    manifest.status = "complete"
    manifest.write(folder)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    if manifest.num_truncated:
        counts = (manifest.num_truncated, manifest.num_captions, manifest.max_length)
        logger.warning("%d of %d captions were cut at %d tokens.", *counts)
