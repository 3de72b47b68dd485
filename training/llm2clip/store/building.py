"""Building a store: the row of each key once, in shards that survive a kill."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from llm2clip.command_line.progress import ProgressBar, in_section
from llm2clip.command_line.settings import require_choice
from llm2clip.files.atomic import remove_unfinished
from llm2clip.files.locks import WAIT, folder_lock
from llm2clip.models.embeddings import require_finite_rows
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
from llm2clip.store.shards import ComputedRows, ShardFile, finished_shard, write_content, write_shard
from llm2clip.store.store import INDEX, Store, StoreT, caption_keys, index_of

logger = logging.getLogger(__name__)

# Seconds to wait for another run where other processes wait meanwhile, for 30 minutes by default.
WAIT_OF_SEVERAL = 20 * 60.0
# Captions to their embeddings, and how many of them were truncated.
Embed = Callable[[list[str]], tuple[Tensor, int]]


def build_store(
    path: str | Path,
    keys: np.ndarray,
    manifest: StoreManifest,
    compute: Callable[[np.ndarray], Iterable[ComputedRows]],
    *,
    title: str,
    shard_size: int = 8192,
    show_progress_bar: bool = True,
    processes: Any = None,
    share_evenly: bool = False,
    kind: type[StoreT] = Store,  # type: ignore[assignment]
    name: Callable[[int], str] = "row {}".format,
) -> StoreT:
    """Compute the rows that a store lacks, and open it; resume an interrupted build, or append to a complete store.

    The missing keys are cut into shards in the given order. A shard is written under a temporary name, flushed to
    disk and renamed, and then its manifest: it is complete or missing. Shards that are whole are kept, and the result
    equals that of an uninterrupted build. Several processes share the work by shards; the first one locks the folder:
    one build at a time, and the next one waits, since it may need the same rows.

    Args:
        path: The folder, created if it does not exist.
        keys: (n, 2) int64, distinct, the same in every process.
        manifest: The encoder and the format.
        compute: Yields the rows of the keys at some positions, in their order, some at a time.
        title, show_progress_bar: Title of the progress bar, and whether there is one, in the first process.
        shard_size: Rows of a shard; a kill loses those of one.
        processes: Those that share the work, accelerate's `PartialState`; None for this one alone.
        share_evenly: Make shards so small that each process has some; otherwise the files are the same for any number
            of processes.
        kind: The class that the store is opened by.
        name: Describes the row of the key at a position in errors.

    Raises:
        StoreMismatchError: Another encoder made the store.
        NonFiniteError: A value is NaN or infinite.
        ValueError: Another run uses the folder for too long, or a value exceeds the range of the stored dtype.
    """
    require_choice("dtype", manifest.dtype, StoredDtype)
    rank, world_size, wait = 0, 1, lambda: None
    if processes is not None:
        rank, world_size, wait = processes.process_index, processes.num_processes, processes.wait_for_everyone
    folder, patience = Path(path), WAIT_OF_SEVERAL if world_size > 1 else WAIT
    with folder_lock(folder, patience) if rank == 0 else contextlib.nullcontext():
        wait()  # no rank reads the folder before rank 0 has it to itself
        numbers = _numbers(folder)
        wait()  # all ranks have listed them before one is deleted
        for number in numbers[rank::world_size]:
            if finished_shard(folder / shard_name(number), manifest, contents=True) is None:
                (folder / INDEX).unlink(missing_ok=True)
                manifest_path(folder / shard_name(number)).unlink(missing_ok=True)
        wait()
        kept = _manifests(folder)
        indexed = _open_indexed(folder, kept)
        known = index_of(_files(folder, kept)) if indexed is None else indexed
        missing = np.flatnonzero(known.find(keys) < 0)
        free = (number for number in itertools.count() if number not in kept)
        if share_evenly:
            shard_size = min(shard_size, max(1, math.ceil(len(keys) / world_size)))
        parts = [missing[start : start + shard_size] for start in range(0, len(missing), shard_size)]
        work = list(zip(free, parts, strict=False))
        wait()  # every rank has read the folder before it changes
        mine = work[rank::world_size]
        total = sum(len(positions) for _, positions in mine)
        with ProgressBar(title, total, manifest.about.unit, show_progress_bar and rank == 0 and total > 0) as bar:
            for number, positions in mine:
                rows = _counted(compute(positions), bar)
                named = partial(_named, name, positions)
                write_shard(folder / shard_name(number), keys[positions], rows, manifest, named)
        wait()
        if rank == 0:
            if work or indexed is None:
                _write_index(folder, keys)
            else:
                words = manifest.about.name, folder, manifest.about.unit
                level = logging.DEBUG if in_section() else logging.INFO
                logger.log(level, "The %s %s already contains all these %ss.", *words)
        wait()
        store = kind.open(folder, verify=False)  # before another run may change the folder
        wait()
    return store


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}{ROWS_SUFFIX}"


def _counted(parts: Iterable[ComputedRows], bar: ProgressBar) -> Iterator[ComputedRows]:
    for part in parts:
        yield part
        bar.update(len(part.rows))


def _named(name: Callable[[int], str], positions: np.ndarray, row: int) -> str:
    return name(int(positions[row]))


def _numbers(folder: Path) -> list[int]:
    """Return the numbers of the shards of a folder that have a manifest."""
    names = (path.name for path in folder.glob(f"shard-*{MANIFEST_SUFFIX}"))
    return sorted(int(name.removeprefix("shard-").removesuffix(MANIFEST_SUFFIX)) for name in names)


def _manifests(folder: Path) -> dict[int, StoreManifest]:
    """Return the manifests of the shards of a folder, which are whole, by their numbers."""
    return {number: StoreManifest.read(manifest_path(folder / shard_name(number))) for number in _numbers(folder)}


def _files(folder: Path, manifests: dict[int, StoreManifest]) -> list[ShardFile]:
    return [ShardFile.of(folder / shard_name(number), manifest) for number, manifest in manifests.items()]


def _open_indexed(folder: Path, manifests: dict[int, StoreManifest]) -> Store | None:
    """Open a store whose index is whole and has all its shards: a run may be killed before it adds some."""
    try:
        opened = Store.open(folder, verify=False)
    except (FileNotFoundError, StoreDamagedError, StoreIncompleteError):
        return None
    return opened if {shard.path.name for shard in opened.shards} == set(map(shard_name, manifests)) else None


def _write_index(folder: Path, keys: np.ndarray) -> None:
    """Write the index of a complete store, without which it counts as incomplete; `keys` have to be in it."""
    manifests = _manifests(folder)
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
    size, checksum = write_content(rows_path(folder / INDEX), [save(index.columns())])
    manifest = replace(
        next(iter(manifests.values())), rows=len(index), shards=shards, skipped=skipped, counts=counts, bytes=size,
        checksum=checksum,
    )  # fmt: skip
    manifest.write(folder / INDEX)
    remove_unfinished(folder)  # of any machine: nobody else writes here now


def drop_rows(path: str | Path, is_unwanted: Callable[[np.ndarray, Mapping[int, str]], np.ndarray]) -> None:
    """Rewrite the shards that have unwanted rows, without these.

    A kill loses the rows of one shard, which are then computed again. Damaged shards are left to [`build_store`].

    Args:
        path: The folder, which nobody else writes.
        is_unwanted: Says of the keys of a shard, `(rows, 2)`, which are unwanted, `(rows,)` bool; the second argument
            is why rows were skipped, by their number in the shard.
    """
    folder = Path(path)
    was_complete = (folder / INDEX).is_file()
    for number in _numbers(folder):
        file = folder / shard_name(number)
        with contextlib.suppress(StoreDamagedError):
            manifest = StoreManifest.read(manifest_path(file))
            shard = ShardFile.of(file, manifest)
            keys = shard.keys()
            reasons = {row: reason for row, _, reason in manifest.skipped}
            kept = np.flatnonzero(~is_unwanted(keys, reasons))
            if len(kept) == len(keys):
                continue
            (folder / INDEX).unlink(missing_ok=True)
            if not len(kept):
                manifest_path(file).unlink()
                file.unlink()
                continue
            places = {row: place for place, row in enumerate(kept.tolist())}
            skipped = [(places[row], key, reason) for row, key, reason in manifest.skipped if row in places]
            write_shard(file, keys[kept], [ComputedRows(shard.open()[kept], skipped=skipped)], manifest)
    if was_complete and not (folder / INDEX).is_file() and _numbers(folder):
        _write_index(folder, np.empty((0, 2), np.int64))


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
        captions: Distinct captions, the same in every process.
        embed: Maps n captions to (n, width) finite numbers and the number of captions that exceed `max_length`.
        manifest: The text encoder and the format, see [`caption_manifest`].
        embed_size: Captions per call of `embed`, which can sort them by length.
        options: `shard_size`, `show_progress_bar` and `processes` of [`build_store`], which also describes how a build
            survives a kill.

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

    def compute(positions: np.ndarray) -> Iterator[ComputedRows]:
        for start in range(0, len(positions), embed_size):
            texts = [captions[position] for position in positions[start : start + embed_size]]
            yield caption_rows(embed, texts, manifest)

    store = build_store(
        path,
        keys,
        replace(manifest, counts={"truncated": 0}),
        compute,
        title="Embedding captions",
        name=lambda position: caption_name(captions[position]),
        **options,
    )
    built = store.manifest
    if truncated := built.counts["truncated"]:
        counts = truncated, built.rows, manifest.identity["max_length"]
        logger.warning("%d of %d captions were cut at %d tokens.", *counts)
    return built


def caption_rows(embed: Embed, texts: list[str], manifest: StoreManifest) -> ComputedRows:
    """Compute the embeddings of captions as a manifest describes them.

    Raises:
        NonFiniteError: An embedding that is normalised is NaN or infinite.
        ValueError: The embeddings have another shape, or one has no direction.
    """
    vectors, truncated = embed(texts)
    vectors = vectors.detach().float().cpu()
    if vectors.shape != (len(texts), manifest.width):
        raise ValueError(
            f"{manifest.encoder} returned embeddings of shape {tuple(vectors.shape)} instead of "
            f"{(len(texts), manifest.width)}."
        )
    if manifest.identity["normalize"]:
        require_finite_rows(vectors, lambda row: caption_name(texts[row]), "captions")
        lengths = vectors.norm(dim=-1, keepdim=True)
        if (zero := (lengths[:, 0] == 0).nonzero()).numel():
            raise ValueError(f"The embedding of {caption_name(texts[int(zero[0])])} is zero, which has no direction.")
        vectors = vectors / lengths
    return ComputedRows(vectors, {"truncated": truncated})


def caption_name(caption: str) -> str:
    """Describe a caption in errors."""
    return f"the caption {caption[:200]!r}"
