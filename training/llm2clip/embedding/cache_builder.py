"""Building the embedding cache: each distinct caption once, in shards that survive a kill."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file

from llm2clip.data.records import caption_keys
from llm2clip.embedding.cache import (
    MANIFEST,
    CacheDamagedError,
    CacheManifest,
    CacheMismatchError,
    KeyIndex,
    read_keys,
    read_layout,
    shard_name,
)
from llm2clip.utils.files import atomic_path, write_text

logger = logging.getLogger(__name__)

IDENTITY = (
    "fingerprint",
    "hidden_size",
    "pooling",
    "prompt_prefix",
    "prompt_suffix",
    "max_length",
    "text_model_dtype",
    "dtype",
    "normalize",
)
Embed = Callable[[list[str]], tuple[torch.Tensor, int]]


def build_embedding_cache(
    path: str | Path,
    captions: Sequence[str],
    embed: Embed,
    *,
    fingerprint: str,
    text_model_name: str,
    hidden_size: int,
    pooling: str,
    prompt_prefix: str,
    prompt_suffix: str,
    max_length: int,
    text_model_dtype: str = "float32",
    dtype: str = "float16",
    normalize: bool = False,
    shard_size: int = 8192,
    embed_size: int = 1024,
    show_progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
) -> CacheManifest:
    """Embed captions into a cache; go on where an earlier call stopped, or append what a complete cache lacks.

    The captions are cut into shards in the order given. A shard is written under a temporary name, flushed to disk
    and renamed, so that it is whole or absent; the shards that are there are kept, and the result equals that of a
    run that was never interrupted. The shards to be made are dealt out over the ranks. One build may run in a folder
    at a time.

    Args:
        path: The folder; made if absent.
        captions: Distinct captions, the same on every rank.
        embed: Turns n captions into (n, hidden_size) finite numbers, and says how many of them exceed `max_length`;
            called with up to `embed_size` at once, so that it can sort them by length.
        fingerprint: Identity of the text encoder.
        text_model_name: Its name, for messages.
        hidden_size: Width of an embedding.
        pooling, prompt_prefix, prompt_suffix, max_length: How the encoder reads a caption; kept in the manifest.
        text_model_dtype: The dtype that the encoder computes in; kept in the manifest.
        dtype: That of the cache: `float16` or `bfloat16`.
        normalize: Store unit vectors.
        shard_size: Captions per shard; a build that goes on keeps the size it began with.
        embed_size: Captions per call of `embed`.
        show_progress: Show a progress bar on rank 0 where standard error is a terminal.
        rank: This process.
        world_size: Number of processes.
        barrier: Waits for all processes; needed when there are several.

    Returns:
        The manifest of the complete cache.

    Raises:
        CacheMismatchError: If the folder holds another encoder's cache, or an unfinished one of other captions.
        ValueError: If captions repeat or are absent, or an embedding has the wrong shape, is not finite or exceeds
            float16.
    """
    if dtype not in ("float16", "bfloat16"):
        raise ValueError(f"The cache's dtype must be 'float16' or 'bfloat16', not {dtype!r}.")
    if world_size > 1 and barrier is None:
        raise ValueError("Several processes need a barrier, such as torch.distributed.barrier.")
    wait = barrier or _no_barrier
    folder = Path(path)
    keys = _distinct_keys(captions)
    manifest = CacheManifest(
        fingerprint=fingerprint,
        text_model_name=text_model_name,
        hidden_size=hidden_size,
        pooling=pooling,
        prompt_prefix=prompt_prefix,
        prompt_suffix=prompt_suffix,
        max_length=max_length,
        text_model_dtype=text_model_dtype,
        dtype=dtype,
        normalize=normalize,
        transformers_version=transformers.__version__,
        shard_size=shard_size,
    )
    manifest, work = _plan(folder, manifest, keys)
    wait()  # every rank has read the folder before rank 0 changes it
    if rank == 0 and work:
        folder.mkdir(parents=True, exist_ok=True)
        manifest.status = "building"
        _write_manifest(folder, manifest)
    wait()
    if CacheManifest.read(folder).plan_digest != manifest.plan_digest:
        raise CacheMismatchError(f"Rank {rank} was given other captions than rank 0 for {folder}.")
    if not work:
        logger.info("The embedding cache %s already holds all %d captions.", folder, len(captions))
    mine = dict(list(work.items())[rank::world_size])
    total = sum(map(len, mine.values()))
    with _progress_bar(total, show_progress and rank == 0 and total > 0) as advance:
        for number, rows in mine.items():
            vectors = torch.empty((len(rows), hidden_size), dtype=getattr(torch, dtype))
            truncated = 0
            for start in range(0, len(rows), embed_size):
                texts = [captions[row] for row in rows[start : start + embed_size]]
                embeddings, cut = embed(texts)
                vectors[start : start + len(texts)] = _checked(embeddings, texts, manifest)
                truncated += cut
                advance(len(texts))
            _write_shard(folder / shard_name(number), vectors, keys[rows], truncated)
    wait()
    if rank == 0 and (work or manifest.status != "complete"):
        _finish(folder, manifest)
    wait()
    return CacheManifest.read(folder)


def _no_barrier() -> None:
    return None


def _distinct_keys(captions: Sequence[str]) -> np.ndarray:
    if not captions:
        raise ValueError("There are no captions to embed.")
    keys = caption_keys(captions)
    _, first, counts = np.unique(keys, axis=0, return_index=True, return_counts=True)
    if len(first) != len(keys):
        repeated = captions[int(first[counts > 1][0])]
        raise ValueError(
            f"{len(keys) - len(first)} captions are there more than once, {repeated[:80]!r} for one; pass distinct "
            "captions (distinct_captions returns such)."
        )
    return keys


def _digest(keys: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(keys, dtype="<i8").tobytes(), digest_size=16).hexdigest()


def _plan(folder: Path, new: CacheManifest, keys: np.ndarray) -> tuple[CacheManifest, dict[int, np.ndarray]]:
    """The manifest to work by, and the captions (positions in `keys`) of each shard that has to be made."""
    there: dict[int, np.ndarray] = {}
    manifest = new
    if (folder / MANIFEST).is_file():
        manifest = CacheManifest.read(folder)
        _check_identity(folder, manifest, new)
        there = _existing_keys(folder, manifest)
    known = KeyIndex(np.concatenate([np.empty((0, 2), np.int64), *there.values()]))
    missing = np.flatnonzero(known.find(keys) < 0)
    absent = [number for number in range(len(manifest.shards)) if number not in there]
    work: dict[int, np.ndarray] = {}
    if absent:
        # The absent shards hold, in order, what the others lack: the digest tells whether these are the captions.
        bounds = np.cumsum([manifest.shards[number] for number in absent])
        work = dict(zip(absent, np.split(missing, bounds[:-1]), strict=True))
        filled = [there[number] if number in there else keys[work[number]] for number in range(len(manifest.shards))]
        if len(missing) != bounds[-1] or _digest(np.concatenate(filled)) != manifest.plan_digest:
            raise CacheMismatchError(
                f"The embedding cache {folder} lacks {len(absent)} of the {len(manifest.shards)} shards planned for "
                f"its {manifest.num_captions} captions, and these {len(keys)} captions are not the same ones. Run the "
                "build to its end with the captions it began with, or delete the folder."
            )
        return manifest, work
    for start in range(0, len(missing), manifest.shard_size):
        rows = missing[start : start + manifest.shard_size]
        work[len(manifest.shards)] = rows
        manifest.shards.append(len(rows))
    manifest.plan_digest = _digest(np.concatenate([*there.values(), keys[missing]]))
    return manifest, work


def _check_identity(folder: Path, old: CacheManifest, new: CacheManifest) -> None:
    for name in IDENTITY:
        if getattr(old, name) != getattr(new, name):
            raise CacheMismatchError(
                f"The embedding cache {folder} was made by {old.text_model_name} with {name} {getattr(old, name)!r}, "
                f"but this build has {name} {getattr(new, name)!r} ({new.text_model_name}). Choose another folder, or "
                "delete this one to embed anew."
            )


def _existing_keys(folder: Path, manifest: CacheManifest) -> dict[int, np.ndarray]:
    there = {}
    for number, rows in enumerate(manifest.shards):
        path = folder / shard_name(number)
        if not path.exists():
            continue
        try:
            there[number] = read_keys(path, read_layout(path, rows, manifest.hidden_size))
        except CacheDamagedError as error:
            logger.warning("%s It is made anew.", error)
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
    _refuse(
        vectors.abs() > torch.finfo(stored).max,
        texts,
        f"exceeds the range of {manifest.dtype}; use bfloat16 or normalize the embeddings",
    )
    return vectors.to(stored)


def _refuse(bad: torch.Tensor, texts: list[str], fault: str) -> None:
    rows = bad.any(dim=-1).nonzero()
    if len(rows):
        raise ValueError(f"The embedding of the caption {texts[int(rows[0])][:200]!r} {fault}.")


def _write_shard(path: Path, vectors: torch.Tensor, keys: np.ndarray, truncated: int) -> None:
    tensors = {"embeddings": vectors, "keys": torch.from_numpy(keys.astype(np.int64))}
    metadata = {"num_truncated": str(truncated)}  # safetensors writes several entries in no fixed order
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def _write_manifest(folder: Path, manifest: CacheManifest) -> None:
    write_text(folder / MANIFEST, manifest.to_json())


def _finish(folder: Path, manifest: CacheManifest) -> None:
    layouts = [
        read_layout(folder / shard_name(number), rows, manifest.hidden_size)
        for number, rows in enumerate(manifest.shards)
    ]
    manifest.num_truncated = sum(int(layout.metadata["num_truncated"]) for layout in layouts)
    manifest.status = "complete"
    _write_manifest(folder, manifest)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    if manifest.num_truncated:
        logger.warning(
            "%d of %d captions were cut at %d tokens.",
            manifest.num_truncated,
            manifest.num_captions,
            manifest.max_length,
        )


@contextlib.contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task("Embedding captions", total=total)
        yield lambda count: progress.advance(task, count)
