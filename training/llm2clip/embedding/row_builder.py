"""Building a cache of embeddings: the row of each key once, in shards that survive a kill."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np
import torch
from safetensors.torch import save_file

from llm2clip.embedding.cache_files import (
    MANIFEST,
    CacheDamagedError,
    CacheDtype,
    CacheMismatchError,
    StoreManifest,
    checksum_path,
    has_changed,
    open_shard,
    recorded_checksum,
    shard_name,
)
from llm2clip.embedding.keyed_rows import KeyIndex
from llm2clip.utils.files import atomic_path, remove_unfinished, sha256, write_text
from llm2clip.utils.locks import folder_lock
from llm2clip.utils.progress import ProgressBar, in_section, progress_bar
from modeling_llm2clip.modeling_llm2clip_utils import apply_umask

logger = logging.getLogger(__name__)

# The name of a changed shard ends so until it is computed again.
DAMAGED = ".damaged"

ManifestT = TypeVar("ManifestT", bound=StoreManifest)
# Computes the rows of some keys, given by their positions: (n, hidden) in the dtype of the cache, and what the shard
# records of them, a single entry, since safetensors does not write several in a fixed order. It advances the bar.
Compute = Callable[[np.ndarray, ProgressBar], tuple[torch.Tensor, dict[str, str]]]


def build_rows(
    path: str | Path,
    keys: np.ndarray,
    compute: Compute,
    manifest: ManifestT,
    *,
    title: str,
    show_progress_bar: bool = True,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
) -> ManifestT:
    """Compute the rows of a cache; resume an interrupted build, or append to a complete cache what it lacks.

    The keys are cut into shards in the given order. A shard is written under a temporary name, flushed to disk and
    renamed: it is complete or absent, and its checksum is stored beside it until the manifest has it. Existing shards
    are kept unless they have changed, and the result equals that of an uninterrupted build. The missing shards are
    distributed over the ranks. Rank 0 locks the folder: one build at a time.

    Args:
        path: The folder, created if it does not exist.
        keys: (n, 2) int64, distinct, the same on every rank.
        compute: See `Compute`.
        manifest: The encoder and the format of the cache. A build that is resumed keeps its `shard_size`.
        title, show_progress_bar: Title of the progress bar, and whether there is one, on rank 0.
        rank, world_size: Rank of this process, and number of processes.
        barrier: Waits for all processes; required when there are several.

    Returns:
        The manifest of the complete cache.

    Raises:
        CacheMismatchError: The folder contains the cache of another encoder, or an unfinished one of other keys.
        ValueError: Another run uses the folder.
    """
    if world_size > 1 and barrier is None:
        raise ValueError("Several processes need a barrier, such as torch.distributed.barrier.")
    wait = barrier or (lambda: None)
    folder = Path(path)
    with folder_lock(folder) if rank == 0 else contextlib.nullcontext():
        wait()  # no rank reads the folder before rank 0 has it to itself
        manifest = replace(manifest, shards=[], checksums={})
        if (folder / MANIFEST).is_file():
            manifest = _manifest_to_continue(folder, manifest)
            _set_changed_aside(folder, manifest, rank, world_size)
        wait()
        manifest, work = _plan(folder, manifest, keys)
        _start(folder, manifest, work, rank, wait)
        mine = dict(list(work.items())[rank::world_size])
        total = sum(map(len, mine.values()))
        shown = show_progress_bar and rank == 0 and total > 0
        with progress_bar(title, total, manifest.UNIT, shown) as bar:
            for number, positions in mine.items():
                rows, metadata = compute(positions, bar)
                tensors = {"embeddings": rows, "keys": torch.from_numpy(keys[positions])}
                checksum_path(folder, number).unlink(missing_ok=True)
                with atomic_path(folder / shard_name(number)) as temporary:
                    save_file(tensors, temporary, metadata)
                    apply_umask(temporary)
                    checksum = sha256(temporary)
                write_text(checksum_path(folder, number), f"{checksum}\n")
        wait()
        if rank == 0 and (work or manifest.status != "complete"):
            _finish(folder, manifest)
        wait()
    return type(manifest).read(folder)


def stored_rows(vectors: torch.Tensor, manifest: StoreManifest, name: Callable[[int], str]) -> torch.Tensor:
    """Round vectors to the dtype of a cache, after checking them.

    Args:
        vectors: (n, hidden) of any dtype and device.
        name: Describes the row of a vector in errors.

    Raises:
        ValueError: A value is not finite or exceeds the range of the dtype.
    """
    vectors = vectors.detach().float().cpu()
    refuse_rows(~torch.isfinite(vectors), name, "is not finite")
    stored = getattr(torch, manifest.dtype)
    fault = f"exceeds the range of {manifest.dtype}; use bfloat16 or normalize the embeddings"
    refuse_rows(vectors.abs() > torch.finfo(stored).max, name, fault)
    return vectors.to(stored)


def refuse_rows(bad: torch.Tensor, name: Callable[[int], str], fault: str) -> None:
    """Raise a ValueError that names the first row with a bad value; `bad` is (n, hidden) bool."""
    rows = bad.any(dim=-1).nonzero()
    if len(rows):
        raise ValueError(f"The embedding of {name(int(rows[0]))} {fault}.")


def _start(
    folder: Path, manifest: StoreManifest, work: dict[int, np.ndarray], rank: int, wait: Callable[[], None]
) -> None:
    """Write the manifest of an unfinished build, and check that all ranks have the same keys."""
    wait()  # every rank has read the folder before rank 0 changes it
    if rank == 0 and work:
        manifest.status = "building"
        for number in work:
            manifest.checksums.pop(shard_name(number), None)
        manifest.write(folder)
    wait()
    if type(manifest).read(folder).plan_digest != manifest.plan_digest:
        raise CacheMismatchError(f"Rank {rank} was given other {manifest.UNIT}s than rank 0 for {folder}.")
    if not work:
        level = logging.DEBUG if in_section() else logging.INFO
        logger.log(level, "The %s %s already contains all these %ss.", manifest.NAME, folder, manifest.UNIT)


def _digest(keys: list[np.ndarray]) -> str:
    return hashlib.blake2b(np.concatenate(keys).astype("<i8").tobytes(), digest_size=16).hexdigest()


def _set_changed_aside(folder: Path, manifest: StoreManifest, rank: int, world_size: int) -> None:
    """Rename the shards that are not the files that were written, so that they are computed again."""
    for number in range(rank, len(manifest.shards), world_size):
        path = folder / shard_name(number)
        if path.is_file() and has_changed(folder, manifest, number):
            logger.warning("%s has changed since it was written. It is computed again.", path)
            path.replace(f"{path}{DAMAGED}")


def _plan(folder: Path, manifest: ManifestT, keys: np.ndarray) -> tuple[ManifestT, dict[int, np.ndarray]]:
    """Return the manifest to follow, and the captions (positions in `keys`) of each shard to compute."""
    if manifest.dtype not in get_args(CacheDtype):
        choices = " or ".join(map(repr, get_args(CacheDtype)))
        raise ValueError(f"The dtype of a cache must be {choices}, not {manifest.dtype!r}.")
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
                f"The {manifest.NAME} {folder} lacks {len(absent)} of the {len(manifest.shards)} shards planned for "
                f"its {manifest.num_rows} {manifest.UNIT}s, and these {len(keys)} {manifest.UNIT}s are not the same "
                f"ones. Finish the build with the {manifest.UNIT}s that it was started with, or delete the folder."
            )
        return manifest, work
    parts = [missing[start : start + manifest.shard_size] for start in range(0, len(missing), manifest.shard_size)]
    work = dict(enumerate(parts, len(manifest.shards)))
    manifest.shards += map(len, parts)
    manifest.plan_digest = _digest([*there.values(), keys[missing]])
    return manifest, work


def _manifest_to_continue(folder: Path, new: ManifestT) -> ManifestT:
    old = type(new).read(folder)
    for name in new.IDENTITY:
        if getattr(old, name) != getattr(new, name):
            raise CacheMismatchError(
                f"The {new.NAME} {folder} was made by {old.encoder} with {name} {getattr(old, name)!r}, but this "
                f"build has {name} {getattr(new, name)!r} ({new.encoder}). Choose another folder, or delete "
                "this one to start again."
            )
    return old


def _existing_keys(folder: Path, manifest: StoreManifest) -> dict[int, np.ndarray]:
    there = {}
    for number in range(len(manifest.shards)):
        if (folder / shard_name(number)).exists():
            try:
                there[number] = open_shard(folder, manifest, number).keys()
            except CacheDamagedError as error:
                logger.warning("%s It is computed again.", error)
    return there


def _finish(folder: Path, manifest: StoreManifest) -> None:
    shards = [open_shard(folder, manifest, number) for number in range(len(manifest.shards))]
    manifest.finish([shard.metadata for shard in shards])
    manifest.status = "complete"
    manifest.checksums = {
        shard.path.name: recorded_checksum(folder, manifest, number) or sha256(shard.path)
        for number, shard in enumerate(shards)
    }
    manifest.write(folder)
    for pattern in (".*.tmp", ".shard-*.sha256", f"shard-*{DAMAGED}"):
        for leftover in folder.glob(pattern):
            leftover.unlink()
    remove_unfinished(folder)
