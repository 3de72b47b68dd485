"""Embedding the captions of streamed sources shard by shard, into sidecars."""

from __future__ import annotations

import logging
import posixpath
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from llm2clip.data import CaptionSource
from llm2clip.data.shards import ShardedSource, SourceShard
from llm2clip.data.tars import list_tar
from llm2clip.embedding.cache import EmbeddingCache
from llm2clip.embedding.cache_builder import Embed, rows_to_store
from llm2clip.embedding.cache_files import CacheManifest, CacheMismatchError
from llm2clip.embedding.sidecars import (
    SidecarFolder,
    SidecarManifest,
    distinct_keys,
    sha256,
    source_checksum,
    source_size,
)
from llm2clip.utils.files import atomic_path
from llm2clip.utils.progress import progress_bar
from modeling_llm2clip.modeling_llm2clip_utils import apply_umask

logger = logging.getLogger(__name__)

# Captions per call of the encoder, which can sort them by length.
EMBED_SIZE = 1024


@dataclass
class ShardCounts:
    """What a run has done.

    Attributes:
        shards: Shards of this process.
        done_before: Those that had a valid sidecar.
        captions: Distinct captions of the others, each counted in every shard that has it.
        truncated, reused: Captions among these that were cut, and whose embeddings were copied.
        failed: Shards that could not be embedded, with the reason.
    """

    shards: int
    done_before: int
    captions: int
    truncated: int
    reused: int
    failed: list[str]


class ShardEmbedder:
    """Embeds the shards of sources, each as soon as it is read.

    Args:
        embed: Maps captions to their embeddings and the number of those that were truncated.
        encoder: The text encoder and the format, as the manifest of a cache.
        reused: A cache of the same encoder, whose embeddings are copied instead of being computed.

    Raises:
        CacheMismatchError: Another encoder made `reused`.
    """

    def __init__(self, embed: Embed, encoder: CacheManifest, reused: EmbeddingCache | None = None) -> None:
        self.embed, self.encoder, self.reused = embed, encoder, reused
        if reused is not None:
            other = reused.manifest.identity()
            for name, value in encoder.identity().items():
                if other[name] != value:
                    raise CacheMismatchError(
                        f"the cache {reused.path} has {name} {other[name]!r}, but this run has {value!r}; reuse one "
                        "of the same text encoder and format."
                    )

    def run(
        self,
        sources: Sequence[CaptionSource],
        folder: str | None,
        part: tuple[int, int] = (0, 1),
        rank: int = 0,
        world_size: int = 1,
        show_progress_bar: bool = True,
    ) -> ShardCounts:
        """Embed the shards that have no valid sidecar.

        Args:
            sources: Streamed sources.
            folder: Where the sidecars go, under the names of the shards; None: beside the shards, which are local.
            part: The i-th of n parts of all shards, which other runs embed at the same time.
            rank, world_size: Processes that share this part.

        Raises:
            FileNotFoundError, SourceError: A source cannot be read.
            ValueError: Sidecars of two shards would have one name, or a remote source has no `folder`.
            CacheMismatchError: Another encoder made the sidecar of a shard.
        """
        jobs = [
            (opened, shard, _folder_of(shard, folder))
            for opened in map(ShardedSource, sources)
            for shard in opened.shards
        ]
        _refuse_equal_names([target.rows_path(shard) for _, shard, target in jobs], folder)
        jobs = jobs[part[0] :: part[1]][rank::world_size]
        counts = ShardCounts(len(jobs), 0, 0, 0, 0, [])
        with progress_bar("Embedding shards", len(jobs), "shard", show_progress_bar and rank == 0) as bar:
            for opened, shard, target in jobs:
                if target.is_embedded(shard, self.encoder, opened.source.caption_columns):
                    counts.done_before += 1
                else:
                    self._count(counts, opened, shard, target)
                bar.update(advance=1)
        return counts

    def _count(self, counts: ShardCounts, opened: ShardedSource, shard: SourceShard, target: SidecarFolder) -> None:
        try:
            manifest = self.embed_shard(opened, shard, target)
        except (ValueError, TypeError, EOFError, tarfile.TarError) as error:  # of this shard; a full disk ends the run
            logger.error("%s cannot be embedded: %s", shard.path, error)
            counts.failed.append(f"{shard.path}: {error}")
            return
        counts.captions += manifest.captions
        counts.truncated += manifest.truncated
        counts.reused += manifest.reused

    def embed_shard(self, opened: ShardedSource, shard: SourceShard, target: SidecarFolder) -> SidecarManifest:
        """Embed the distinct captions of a shard, and write its sidecar and then its manifest."""
        _refuse_cut_tar(shard.path)
        size, checksum = source_size(shard.path), source_checksum(shard.path)
        texts: dict[str, None] = {}
        rows = 0
        for found in opened.captions(shard):
            rows += len(found)
            texts.update(dict.fromkeys(text for captions in found for text in captions))
        captions, keys = distinct_keys(list(texts))
        embeddings, truncated, reused = self._rows(captions, keys)
        rows_path, manifest_path = target.rows_path(shard), target.manifest_path(shard)
        # Until the new manifest is written, the shard counts as missing.
        manifest_path.unlink(missing_ok=True)
        with atomic_path(rows_path) as temporary:
            save_file({"embeddings": embeddings, "keys": torch.from_numpy(keys.copy())}, temporary)
            apply_umask(temporary)
        manifest = SidecarManifest(
            encoder=_encoder_fields(self.encoder),
            source=posixpath.basename(shard.name),
            source_bytes=size,
            source_checksum=checksum,
            caption_columns=list(opened.source.caption_columns),
            rows=rows,
            captions=len(captions),
            truncated=truncated,
            reused=reused,
            bytes=rows_path.stat().st_size,
            checksum=sha256(rows_path),
        )
        manifest.write(manifest_path)
        return manifest

    def _rows(self, captions: list[str], keys: np.ndarray) -> tuple[torch.Tensor, int, int]:
        """Return the embeddings of captions in the stored dtype, how many were cut, and how many were copied."""
        found = np.full(len(captions), -1) if self.reused is None else self.reused.find(keys)
        rows = torch.empty((len(captions), self.encoder.hidden_size), dtype=getattr(torch, self.encoder.dtype))
        known = np.flatnonzero(found >= 0)
        if self.reused is not None and len(known):
            rows[torch.from_numpy(known)] = self.reused.read(found[known])
        truncated, missing = 0, np.flatnonzero(found < 0)
        for start in range(0, len(missing), EMBED_SIZE):
            places = missing[start : start + EMBED_SIZE]
            texts = [captions[place] for place in places]
            vectors, cut = self.embed(texts)
            rows[torch.from_numpy(places)] = rows_to_store(vectors, texts, self.encoder)
            truncated += cut
        return rows, truncated, len(known)


def _refuse_cut_tar(path: str) -> None:
    """Raise an error if a local tar is cut short, whose rest tarfile would read as if it were whole."""
    if path.endswith(".tar") and "://" not in path:
        for _ in list_tar(Path(path)):
            pass


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


def _refuse_equal_names(paths: list[Path], folder: str | None) -> None:
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise ValueError(
                f"two shards would have the sidecar {path}. Give their sources an output_dir each, or leave it unset "
                "to write the sidecars beside the shards."
            )
        seen.add(path)


def _encoder_fields(encoder: CacheManifest) -> dict[str, object]:
    names = (*encoder.IDENTITY, "text_model_name", "transformers_version")
    return {name: value for name, value in asdict(encoder).items() if name in names}
