"""Embedding the captions of streamed sources shard by shard, into sidecars."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm2clip.command_line.progress import ProgressBar
from llm2clip.data import CaptionSource
from llm2clip.data.shards import ShardedSource, SourceShard
from llm2clip.data.sidecars import SidecarFolder
from llm2clip.files.atomic import remove_leftovers
from llm2clip.files.locks import remove_stale_lock
from llm2clip.files.remote_path import AnyPath
from llm2clip.store import EmbeddingCache, StoreManifest, StoreMismatchError
from llm2clip.store.building import Embed, check_embeddings
from llm2clip.store.manifest import manifest_path
from llm2clip.store.store import caption_keys

logger = logging.getLogger(__name__)

# Captions per call of the encoder, which can sort them by length.
EMBED_SIZE = 1024
# Rows of a sidecar that are in memory at a time, where they are copied.
COPY_SIZE = 16 * EMBED_SIZE
# Captions of a parquet file that are one shard: 256 MiB of rows of width 4096 in 16 bit. A kill loses no more.
PART_CAPTIONS = 2**15


class ShardJob(NamedTuple):
    """A shard to embed: its source, and the folder of its sidecar."""

    opened: ShardedSource
    shard: SourceShard
    target: SidecarFolder


@dataclass
class ShardCounts:
    """What was done of shards.

    Attributes:
        shards: The shards.
        done_before: Those that had a valid sidecar.
        captions: Distinct captions of the others, each counted in every shard that has it.
        truncated, reused: Captions among these that were cut, and whose embeddings were copied.
        failed: Shards that could not be embedded, with the reason.
    """

    shards: int = 0
    done_before: int = 0
    captions: int = 0
    truncated: int = 0
    reused: int = 0
    failed: list[str] = field(default_factory=list)

    def __add__(self, other: ShardCounts) -> ShardCounts:
        return ShardCounts(*(getattr(self, count.name) + getattr(other, count.name) for count in fields(self)))


def count_shards(done: Iterable[ShardCounts], total: int, show_progress_bar: bool = True) -> ShardCounts:
    """Count what is done of shards while it happens, with a progress bar; log why a shard could not be embedded."""
    counts, start = ShardCounts(), time.monotonic()
    with ProgressBar("Embedding shards", total, "shard", show_progress_bar) as bar:
        for outcome in done:
            counts += outcome
            for failure in outcome.failed:
                logger.error("Cannot embed %s", failure)
            if counts.captions:
                rate = counts.captions / max(time.monotonic() - start, 1e-9)
                bar.set_postfix_str(f"{rate:,.1f} captions/s", refresh=False)
            bar.update()
    return counts


def list_jobs(
    sources: Sequence[CaptionSource],
    folder: str | None,
    part: tuple[int, int] = (0, 1),
    part_captions: int = PART_CAPTIONS,
) -> list[ShardJob]:
    """List the shards of sources.

    Args:
        sources: Streamed sources.
        folder: Where the sidecars go, under the names of the shards, local or a URL; None: beside the shards, which
            are local.
        part: The i-th of n parts of all shards, which other runs embed at the same time.
        part_captions: Captions of a parquet file that are one shard; see [`ShardedSource.cut`].

    Raises:
        FileNotFoundError, SourceError: A source cannot be read.
        ValueError: Sidecars of two shards would have one name, a file was embedded in other parts, or a remote source
            has no `folder`.
        OSError: A folder cannot be written.
    """
    jobs = [
        ShardJob(opened, shard, target)
        for opened in map(ShardedSource, sources)
        for parts in opened.cut(part_captions)
        for target in [_folder_of(parts[0], folder)]
        for shard in _as_embedded(parts, target)
    ]
    for target in {job.target.folder: job.target for job in jobs}.values():
        target.require_writable()
    _refuse_equal_names([job.target.rows_path(job.shard) for job in jobs])
    return jobs[part[0] :: part[1]]


def _as_embedded(parts: list[SourceShard], target: SidecarFolder) -> list[SourceShard]:
    """Return the parts of a file, or the file itself if it was embedded as a whole."""
    if parts[0].part is None:
        return parts
    whole = parts[0]._replace(part=None)
    if target.manifest_path(whole).is_file():
        return [whole]
    if others := [shard for shard in target.manifests(whole) if shard not in parts]:
        raise ValueError(
            f"{target.manifest_path(others[0])} is of a part that {others[0].path} is not cut into now. Delete "
            "the sidecars of that file to start again."
        )
    return parts


def remove_leftovers_of(jobs: Sequence[ShardJob], patience: float = 0.0) -> None:
    """Remove what killed processes of this machine left of the sidecars of shards; see [`remove_leftovers`]."""
    for path in filter(None, (job.target.lock_path(job.shard) for job in jobs)):
        remove_stale_lock(path)
    rows = (job.target.rows_path(job.shard) for job in jobs)
    written = [file for path in rows for file in (path, manifest_path(path)) if isinstance(file, Path)]
    if removed := remove_leftovers(written, patience):
        logger.info("Removed %d unfinished files of killed runs, such as %s.", len(removed), removed[0])


class ShardEmbedder:
    """Embeds the shards of sources, each as soon as it is read.

    Args:
        embed: Maps captions to their embeddings and the number of those that were truncated.
        encoder: The text encoder and the format.
        reused: A cache or sidecars of the same encoder, whose embeddings are copied instead of being computed.

    Raises:
        StoreMismatchError: Another encoder made `reused`.
    """

    def __init__(self, embed: Embed, encoder: StoreManifest, reused: EmbeddingCache | None = None) -> None:
        self.embed, self.encoder, self.reused = embed, encoder, reused
        if reused is not None and (difference := reused.manifest.difference(encoder)) is not None:
            name, stored, wanted = difference
            raise StoreMismatchError(
                f"{reused.path} has {name} {stored!r}, but this run has {wanted!r}; reuse one of the same text "
                "encoder and format."
            )

    def run(self, jobs: Sequence[ShardJob], show_progress_bar: bool = True) -> ShardCounts:
        """Embed the shards that have no valid sidecar.

        Raises:
            StoreMismatchError: Another encoder made the sidecar of a shard.
            OSError: A sidecar cannot be written.
        """
        remove_leftovers_of(jobs)
        return count_shards(map(self.embed_job, jobs), len(jobs), show_progress_bar)

    def embed_job(self, job: ShardJob) -> ShardCounts:
        """Embed a shard if it has no valid sidecar; see [`ShardEmbedder.run`]. Another run may do it meanwhile."""
        with job.target.lock(job.shard):
            if job.target.is_embedded(job.shard, self.encoder, job.opened.source.caption_columns):
                return ShardCounts(1, done_before=1)
            try:
                counts = self.embed_shard(*job)
            except ValueError as error:  # of this shard; a full disk ends the run
                reason = str(error)
                return ShardCounts(1, failed=[reason if job.shard.path in reason else f"{job.shard.path}: {reason}"])
        return ShardCounts(1, 0, counts["captions"], counts["truncated"], counts["reused"])

    def embed_shard(self, opened: ShardedSource, shard: SourceShard, target: SidecarFolder) -> dict[str, int]:
        """Embed the distinct captions of a shard, and write its sidecar.

        Returns:
            The numbers of `captions`, and of those that were `truncated` and `reused`.

        Raises:
            ValueError: The shard cannot be read, or an embedding cannot be stored.
            OSError: The sidecar cannot be written.
        """
        text = opened.read(shard)
        captions = list(text.captions)
        keys = caption_keys(captions)
        reused_rows = np.full(len(captions), -1) if self.reused is None else self.reused.find(keys)
        counts = {"truncated": 0, "reused": int((reused_rows >= 0).sum())}
        rows = self._rows(captions, reused_rows, counts)
        target.write(shard, keys, rows, text, replace(self.encoder, counts=counts))
        return {"captions": len(captions), **counts}

    def _rows(self, captions: list[str], reused_rows: np.ndarray, counts: dict[str, int]) -> Iterator[Tensor]:
        """Yield the rows of captions in order, some at a time, and count those that are truncated."""
        missing = np.flatnonzero(reused_rows < 0)
        # Up to these, as many captions are computed as one call takes, or many are copied.
        ends = {*missing[EMBED_SIZE::EMBED_SIZE].tolist(), *range(COPY_SIZE, len(captions), COPY_SIZE), len(captions)}
        for start, end in itertools.pairwise([0, *sorted(ends - {0})]):
            stored = reused_rows[start:end]
            rows = torch.empty((end - start, self.encoder.width), dtype=getattr(torch, self.encoder.dtype))
            known, new = np.flatnonzero(stored >= 0), np.flatnonzero(stored < 0)
            if self.reused is not None and len(known):
                rows[torch.from_numpy(known)] = self.reused.read(stored[known])
            if len(new):
                texts = [captions[start + position] for position in new]
                vectors, cut = self.embed(texts)
                rows[torch.from_numpy(new)] = check_embeddings(vectors, texts, self.encoder)
                counts["truncated"] += cut
            yield rows


def parse_part(text: str | None) -> tuple[int, int]:
    """Read `i/n`, the i-th of n parts, counted from 0.

    Raises:
        ValueError: It has another form, or i is not below n.
    """
    if text is None:
        return 0, 1
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"shard_slice must be i/n with 0 <= i < n, such as 0/8 for the first of eight, not {text!r}.")
    return int(number), int(count)


def _folder_of(shard: SourceShard, folder: str | None) -> SidecarFolder:
    if folder:
        return SidecarFolder(folder)
    if "://" in shard.path:
        raise ValueError(f"{shard.path} is remote; set output_dir to the folder of its embeddings.")
    return SidecarFolder(shard.path.removesuffix(shard.name) or ".")


def _refuse_equal_names(paths: list[AnyPath]) -> None:
    seen: set[AnyPath] = set()
    for path in paths:
        if path in seen:
            raise ValueError(
                f"two shards would have the sidecar {path}. Give their sources an output_dir each, or leave it unset "
                "to write the sidecars beside the shards."
            )
        seen.add(path)
