"""Building a store: the row of each key once, in shards that survive a kill."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, get_args

import numpy as np
import torch
from torch import Tensor

from llm2clip.command_line.progress import ProgressBar, in_section
from llm2clip.files.atomic import remove_unfinished
from llm2clip.files.locks import WAIT, WAIT_OF_SEVERAL, folder_lock
from llm2clip.store.manifest import (
    MANIFEST_SUFFIX,
    ROWS_SUFFIX,
    StoreDamagedError,
    StoredDtype,
    StoreIncompleteError,
    StoreManifest,
    StoreMismatchError,
    manifest_path,
    rows_path,
)
from llm2clip.store.shards import ShardFile, keys_tensor, write_shard
from llm2clip.store.store import INDEX, Store, StoreT, caption_keys, index_of

logger = logging.getLogger(__name__)


@dataclass
class ComputedRows:
    """The rows of a shard.

    Attributes:
        rows: (n, width), in the dtype of the store.
        counts, skipped: Those of [`StoreManifest`]; row numbers are those of the shard.
    """

    rows: Tensor
    counts: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[int, str, str]] = field(default_factory=list)


# Captions to their embeddings, and how many of them were truncated.
Embed = Callable[[list[str]], tuple[Tensor, int]]


class StoreBuild(Generic[StoreT]):
    """The shards of a store that this process has to compute; see [`build_store`].

    Attributes:
        bar: The progress bar, which whoever computes the rows advances.
        store: The complete store, from the end of the build on.
    """

    store: StoreT

    def __init__(
        self,
        folder: Path,
        keys: np.ndarray,
        manifest: StoreManifest,
        shards: Sequence[tuple[int, np.ndarray]],
        bar: ProgressBar,
    ) -> None:
        self.folder, self.keys, self.manifest, self.shards, self.bar = folder, keys, manifest, shards, bar

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of each shard, and the positions of its keys."""
        return iter(self.shards)

    def write(self, number: int, positions: np.ndarray, computed: ComputedRows) -> None:
        """Write a shard."""
        tensors = {"rows": computed.rows, "keys": keys_tensor(self.keys[positions])}
        manifest = replace(self.manifest, counts=computed.counts, skipped=computed.skipped)
        write_shard(self.folder / shard_name(number), tensors, manifest)


@contextlib.contextmanager
def build_store(
    path: str | Path,
    keys: np.ndarray,
    manifest: StoreManifest,
    *,
    title: str,
    shard_size: int = 8192,
    wait_for_others: bool = False,
    show_progress_bar: bool = True,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
    kind: type[StoreT] = Store,  # type: ignore[assignment]
) -> Iterator[StoreBuild[StoreT]]:
    """Compute the rows that a store lacks, and open it; resume an interrupted build, or append to a complete store.

    ```
    with build_store(path, keys, manifest, title="Embedding images") as build:
        for number, positions in build:
            build.write(number, positions, ComputedRows(...))
    build.store
    ```

    The missing keys are cut into shards in the given order. A shard is written under a temporary name, flushed to
    disk and renamed, and then its manifest: it is complete or missing. Shards that are whole are kept, and the result
    equals that of an uninterrupted build. The missing shards are distributed over the ranks. Rank 0 locks the folder:
    one build at a time.

    Args:
        path: The folder, created if it does not exist.
        keys: (n, 2) int64, distinct, the same on every rank.
        manifest: The encoder and the format.
        title, show_progress_bar: Title of the progress bar, and whether there is one, on rank 0.
        shard_size: Rows of a shard; a kill loses those of one.
        wait_for_others: Wait for another run that uses the folder, whose rows this one may need; otherwise that is an
            error after a few seconds.
        rank, world_size: Rank of this process, and number of processes.
        barrier: Waits for all processes; required when there are several.
        kind: The class that the store is opened by.

    Raises:
        StoreMismatchError: Another encoder made the store.
        ValueError: Another run uses the folder.
    """
    if world_size > 1 and barrier is None:
        raise ValueError("Several processes need a barrier, such as torch.distributed.barrier.")
    if manifest.dtype not in get_args(StoredDtype):
        choices = " or ".join(map(repr, get_args(StoredDtype)))
        raise ValueError(f"The dtype of a store must be {choices}, not {manifest.dtype!r}.")
    wait = barrier or (lambda: None)
    folder = Path(path)
    patience = (WAIT_OF_SEVERAL if world_size > 1 else WAIT) if wait_for_others else None
    with folder_lock(folder, patience) if rank == 0 else contextlib.nullcontext():
        wait()  # no rank reads the folder before rank 0 has it to itself
        stored = list(_manifests(folder).items())
        wait()  # all ranks have read them before one is deleted
        for number, earlier in stored[rank::world_size]:
            _drop_damaged(folder, number, earlier, manifest)
        wait()
        kept = _manifests(folder)
        indexed = _open_indexed(folder, kept)
        known = index_of(_files(folder, kept)) if indexed is None else indexed
        missing = np.flatnonzero(known.find(keys) < 0)
        numbers = (number for number in itertools.count() if number not in kept)
        parts = [missing[start : start + shard_size] for start in range(0, len(missing), shard_size)]
        work = list(zip(numbers, parts, strict=False))
        wait()  # every rank has read the folder before it changes
        mine = work[rank::world_size]
        total = sum(len(positions) for _, positions in mine)
        with ProgressBar(title, total, manifest.about.unit, show_progress_bar and rank == 0 and total > 0) as bar:
            build: StoreBuild[StoreT] = StoreBuild(folder, keys, manifest, mine, bar)
            yield build
        wait()
        if rank == 0:
            if work or indexed is None:
                _write_index(folder, keys)
            else:
                words = manifest.about.name, folder, manifest.about.unit
                level = logging.DEBUG if in_section() else logging.INFO
                logger.log(level, "The %s %s already contains all these %ss.", *words)
        wait()
        build.store = kind.open(folder, verify=False)  # before another run may change the folder
        wait()


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}{ROWS_SUFFIX}"


def check_rows(vectors: Tensor, dtype: StoredDtype, name: Callable[[int], str], advice: str = "") -> Tensor:
    """Round vectors, (n, width) of any dtype and device, to the dtype of a store, after checking them.

    Args:
        name: Describes the row of a vector in errors.
        advice: What to do about a value that exceeds the range.

    Raises:
        ValueError: A value is not finite or exceeds the range of the dtype.
    """
    vectors = vectors.detach().float().cpu()
    refuse_rows(~torch.isfinite(vectors), name, "is not finite")
    stored = getattr(torch, dtype)
    refuse_rows(vectors.abs() > torch.finfo(stored).max, name, f"exceeds the range of {dtype}{advice}")
    return vectors.to(stored)


def refuse_rows(bad: Tensor, name: Callable[[int], str], fault: str) -> None:
    """Raise a ValueError that names the first row with a bad value; `bad` is (n, width) bool."""
    rows = bad.any(dim=-1).nonzero()
    if len(rows):
        raise ValueError(f"The embedding of {name(int(rows[0]))} {fault}.")


def _manifests(folder: Path) -> dict[int, StoreManifest | None]:
    """Return the manifests of the shards of a folder by their numbers; None for one that is damaged."""
    manifests: dict[int, StoreManifest | None] = {}
    for path in folder.glob(f"shard-*{MANIFEST_SUFFIX}"):
        number = int(path.name.removeprefix("shard-").removesuffix(MANIFEST_SUFFIX))
        try:
            manifests[number] = StoreManifest.read(path)
        except StoreDamagedError:
            manifests[number] = None
    return dict(sorted(manifests.items()))


def _drop_damaged(folder: Path, number: int, stored: StoreManifest | None, new: StoreManifest) -> None:
    """Delete the manifest of a shard that is not whole, so that it is computed again.

    Raises:
        StoreMismatchError: Another encoder made it.
    """
    path = folder / shard_name(number)
    if stored is not None and (difference := stored.difference(new)) is not None:
        name, old, wanted = difference
        raise StoreMismatchError(
            f"The {new.about.name} {folder} was made by {stored.encoder} with {name} {old!r}, but this build has "
            f"{name} {wanted!r} ({new.encoder}). Choose another folder, or delete this one to start again."
        )
    try:
        if stored is None:
            raise StoreDamagedError(f"The manifest of {path} is damaged.")
        ShardFile.of(path, stored).require_unchanged()
    except StoreDamagedError as error:
        logger.warning("%s It is computed again.", str(error).partition(";")[0].rstrip(".") + ".")
        (folder / INDEX).unlink(missing_ok=True)
        manifest_path(path).unlink(missing_ok=True)


def _files(folder: Path, manifests: dict[int, Any]) -> list[ShardFile]:
    return [ShardFile.of(folder / shard_name(number), manifest) for number, manifest in manifests.items()]


def _open_indexed(folder: Path, manifests: dict[int, Any]) -> Store | None:
    """Open a store whose index is whole and has all its shards: a run may be killed before it adds some."""
    try:
        opened = Store.open(folder, verify=False)
    except (FileNotFoundError, StoreDamagedError, StoreIncompleteError):
        return None
    return opened if {shard.path.name for shard in opened.shards} == set(map(shard_name, manifests)) else None


def _write_index(folder: Path, keys: np.ndarray) -> None:
    """Write the index of a complete store, without which it counts as incomplete; `keys` have to be in it."""
    manifests: dict[int, Any] = _manifests(folder)
    index = index_of(_files(folder, manifests))
    if lacking := int((index.find(keys) < 0).sum()):
        raise StoreMismatchError(
            f"{folder} lacks {lacking} of {len(keys)} rows after they were computed: the processes were given "
            "different data."
        )
    shards, skipped, counts, first = {}, [], dict[str, int](), 0
    for number, shard in manifests.items():
        shards[shard_name(number)] = [shard.rows, shard.bytes, shard.checksum]
        skipped += [(first + row, key, reason) for row, key, reason in shard.skipped]
        for name, count in shard.counts.items():
            counts[name] = counts.get(name, 0) + count
        first += shard.rows
    manifest = replace(next(iter(manifests.values())), shards=shards, skipped=skipped, counts=counts)
    write_shard(rows_path(folder / INDEX), index.columns(), manifest)
    remove_unfinished(folder)  # of any machine: nobody else writes here now


def build_embedding_cache(
    path: str | Path,
    captions: Sequence[str],
    embed: Embed,
    manifest: StoreManifest,
    *,
    embed_size: int = 1024,
    **options: Any,
) -> StoreManifest:
    """Embed captions into a cache; resume an interrupted build, or append to a complete cache what it lacks.

    Args:
        path: The folder, created if it does not exist.
        captions: Distinct captions, the same on every rank.
        embed: Maps n captions to (n, width) finite numbers and the number of captions that exceed `max_length`.
        manifest: The text encoder and the format, see [`caption_manifest`].
        embed_size: Captions per call of `embed`, which can sort them by length.
        options: `shard_size`, `show_progress_bar`, `rank`, `world_size` and `barrier` of [`build_store`], which also
            describes how a build survives a kill.

    Returns:
        The manifest of the complete cache.

    Raises:
        StoreMismatchError: The folder contains the cache of another encoder.
        ValueError: There are no captions or they repeat, or an embedding has the wrong shape, is not finite or exceeds
            float16.
    """

    if not captions:
        raise ValueError("There are no captions to embed.")
    keys = caption_keys(captions)
    _, first, times = np.unique(keys, axis=0, return_index=True, return_counts=True)
    if len(first) != len(keys):
        raise ValueError(
            f"{len(keys) - len(first)} captions repeat an earlier one, such as "
            f"{captions[int(first[times > 1][0])][:80]!r}; pass distinct captions, as distinct_captions returns them."
        )
    with build_store(path, keys, manifest, title="Embedding captions", **options) as build:
        for number, positions in build:
            rows, cut = [], 0
            for start in range(0, len(positions), embed_size):
                texts = [captions[position] for position in positions[start : start + embed_size]]
                embeddings, truncated = embed(texts)
                rows.append(check_embeddings(embeddings, texts, manifest))
                cut += truncated
                build.bar.update(len(texts))
            build.write(number, positions, ComputedRows(torch.cat(rows), {"truncated": cut}))
    built = build.store.manifest
    if truncated := built.counts["truncated"]:
        counts = truncated, built.rows, manifest.identity["max_length"]
        logger.warning("%d of %d captions were cut at %d tokens.", *counts)
    return built


def check_embeddings(vectors: Tensor, texts: Sequence[str], manifest: StoreManifest) -> Tensor:
    """Check the embeddings of captions, (n, width), and round them to the stored dtype.

    Raises:
        ValueError: They have another shape, or one is not finite, exceeds the range or has no direction.
    """

    def name(row: int) -> str:
        return f"the caption {texts[row][:200]!r}"

    vectors = vectors.detach().float().cpu()
    if vectors.shape != (len(texts), manifest.width):
        raise ValueError(
            f"{manifest.encoder} returned embeddings of shape {tuple(vectors.shape)} instead of "
            f"{(len(texts), manifest.width)}."
        )
    if manifest.identity["normalize"]:
        refuse_rows(~torch.isfinite(vectors), name, "is not finite")
        lengths = vectors.norm(dim=-1, keepdim=True)
        refuse_rows(lengths == 0, name, "is zero, which has no direction")
        vectors = vectors / lengths
    return check_rows(vectors, manifest.dtype, name, "; use bfloat16 or normalize the embeddings")
