"""Embedding the captions of streamed sources shard by shard, into sidecars."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from llm2clip.command_line.progress import ProgressBar
from llm2clip.data import CaptionSource
from llm2clip.data.shards import ShardedSource, SourceShard
from llm2clip.data.sidecars import SidecarFolder
from llm2clip.files.remote_path import AnyPath
from llm2clip.store import EmbeddingCache, StoreManifest
from llm2clip.store.building import Embed, caption_name, caption_rows
from llm2clip.store.shards import ComputedRows, shard_lock, write_shard
from llm2clip.store.store import caption_keys

logger = logging.getLogger(__name__)

# Captions of a sidecar that are in memory at a time, and those per call of the encoder, which can sort them by length.
EMBED_SIZE = 1024
# What one part of a parquet file has at most, all that a kill loses: captions (256 MiB of rows of width 4096 in 16
# bit), and bytes of their columns.
PART_CAPTIONS, PART_BYTES = 2**15, 2**26


class SidecarJob(NamedTuple):
    """A sidecar to write: the source and shard of its captions, and its folder."""

    opened: ShardedSource
    shard: SourceShard
    target: SidecarFolder

    @property
    def path(self) -> AnyPath:
        """The file of its rows."""
        return self.target.rows_path(self.shard)


@dataclass
class EmbedCounts:
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

    def __add__(self, other: EmbedCounts) -> EmbedCounts:
        return EmbedCounts(*(getattr(self, count.name) + getattr(other, count.name) for count in fields(self)))


# Embeds a shard, unless it has a valid sidecar; `embed_shard` with its other arguments.
EmbedShard = Callable[[SidecarJob], EmbedCounts]


def embed_shards(jobs: Sequence[SidecarJob], embed_one: EmbedShard, show_progress_bar: bool = True) -> EmbedCounts:
    """Embed shards one after another, and count what is done.

    Raises:
        StoreMismatchError: Another encoder made the sidecar of a shard.
        OSError: A sidecar cannot be written.
    """
    return count_shards(map(embed_one, jobs), len(jobs), show_progress_bar)


def count_shards(done: Iterable[EmbedCounts], total: int, show_progress_bar: bool = True) -> EmbedCounts:
    """Count what is done of shards while it happens, with a progress bar; log why a shard could not be embedded."""
    counts, start = EmbedCounts(), time.monotonic()
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


def embed_shard(
    job: SidecarJob, embed: Embed, encoder: StoreManifest, reused: EmbeddingCache | None = None
) -> EmbedCounts:
    """Embed the distinct captions of a shard into its sidecar, unless a valid one is there or another run writes it.

    Args:
        embed: Maps captions to their embeddings and the number of those that were truncated.
        encoder: The text encoder and the format.
        reused: A cache or sidecars of the same encoder, whose embeddings are copied instead of being computed.

    Raises:
        StoreMismatchError: Another encoder made the sidecar, or `reused`.
        OSError: The sidecar cannot be written.
    """
    opened, shard, target = job
    if reused is not None:
        reused.manifest.require_same(encoder, reused.path, "Reuse embeddings of the same text encoder and format.")
    with shard_lock(job.path):
        if target.is_embedded(shard, encoder, opened.source.caption_columns):
            return EmbedCounts(1, done_before=1)
        try:
            captions, file = opened.read(shard)
            keys = caption_keys(captions)
            known = np.full(len(captions), -1) if reused is None else reused.find(keys)
            source = replace(file, path=target.path_elsewhere(shard))
            described = replace(encoder, source=source, counts={"truncated": 0, "reused": 0})
            parts = _rows(captions, embed, encoder, reused, known)
            name = lambda row: caption_name(captions[row])  # noqa: E731
            counts = write_shard(job.path, keys, parts, described, name).counts
        except ValueError as error:  # of this shard; a full disk ends the run
            reason = str(error)
            return EmbedCounts(1, failed=[reason if shard.path in reason else f"{shard.path}: {reason}"])
    return EmbedCounts(1, 0, len(captions), counts["truncated"], counts["reused"])


def _rows(
    captions: list[str], embed: Embed, encoder: StoreManifest, reused: EmbeddingCache | None, known: np.ndarray
) -> Iterator[ComputedRows]:
    """Yield the rows of captions in order, some at a time; `known` are those in `reused`, or -1."""
    for start in range(0, len(captions), EMBED_SIZE):
        stored = known[start : start + EMBED_SIZE]
        is_new = stored < 0
        rows, counts = torch.empty((len(stored), encoder.width)), {"reused": int((~is_new).sum())}
        if is_new.any():
            computed = caption_rows(embed, [captions[start + place] for place in np.flatnonzero(is_new)], encoder)
            rows[torch.from_numpy(is_new)] = computed.rows
            counts |= computed.counts
        if reused is not None and counts["reused"]:
            # Which is rounded to what it was.
            rows[torch.from_numpy(~is_new)] = reused.read(stored[~is_new], torch.float32)
        yield ComputedRows(rows, counts)


def list_jobs(
    sources: Sequence[CaptionSource],
    folder: str | None,
    part: tuple[int, int] = (0, 1),
    part_captions: int = PART_CAPTIONS,
    part_bytes: int = PART_BYTES,
) -> list[SidecarJob]:
    """List the shards of sources.

    Args:
        sources: Streamed sources.
        folder: Where the sidecars go, under the names of the shards, local or a URL; None: beside the shards, which
            are local.
        part: The i-th of n parts of all shards, which other runs embed at the same time.
        part_captions, part_bytes: Captions and bytes of a parquet file that are one shard; see
            [`ShardedSource.cut`].

    Raises:
        FileNotFoundError, SourceError: A source cannot be read.
        ValueError: Sidecars of two shards would have one name, a file has changed after it was embedded in parts, or
            a remote source has no `folder`.
        OSError: A folder cannot be written.
    """
    jobs = [
        SidecarJob(opened, shard, target)
        for opened in map(ShardedSource, sources)
        for parts in opened.cut(part_captions, part_bytes)
        for target in [_folder_of(parts[0], folder)]
        for shard in _as_embedded(parts, target)
    ]
    for target in {job.target.folder: job.target for job in jobs}.values():
        target.require_writable()
    _refuse_equal_names([job.path for job in jobs])
    return jobs[part[0] :: part[1]]


def _as_embedded(parts: list[SourceShard], target: SidecarFolder) -> list[SourceShard]:
    """Return the parts of a file as they were embedded, and those that are missing; or the file if that was whole."""
    if parts[0].part is None:
        return parts
    whole = parts[0]._replace(part=None)
    if target.manifest_path(whole).is_file():
        return [whole]
    embedded = [shard.part for shard in target.manifests(whole) if shard.part is not None]
    if other := next((part for part in embedded if part.total != parts[0].part.total), None):
        raise ValueError(
            f"{target.manifest_path(whole._replace(part=other))} is of {whole.path} with {other.total} rows, which "
            f"has {parts[0].part.total} now. Delete the sidecars of that file to start again."
        )
    bounds = [(0, 0), *((part.start, part.stop) for part in embedded), (parts[0].part.total, 0)]
    gaps = [(stop, start) for (_, stop), (start, _) in itertools.pairwise(bounds)]
    lacking = [
        part._replace(start=max(part.start, start), stop=min(part.stop, stop))
        for part in (shard.part for shard in parts if shard.part is not None)
        for start, stop in gaps
        if max(part.start, start) < min(part.stop, stop)
    ]
    return [whole._replace(part=part) for part in sorted([*embedded, *lacking])]


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
