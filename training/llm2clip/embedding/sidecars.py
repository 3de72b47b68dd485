"""Reading embeddings that lie beside their shards (see `sidecar_files`), file by file with the shards."""

from __future__ import annotations

import posixpath
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm2clip.data.parquet_parts import RowGroups
from llm2clip.data.sampling import stable_seed
from llm2clip.data.shards import SourceShard, source_size
from llm2clip.embedding.cache import CaptionEmbeddings
from llm2clip.embedding.cache_files import (
    MANIFEST,
    CacheDamagedError,
    CacheManifest,
    CacheMismatchError,
    MissingCaptionError,
    read_shard,
)
from llm2clip.embedding.sidecar_files import REMEDY, SidecarFolder, SidecarManifest, manifest_paths, stem_of
from llm2clip.utils.files import sha256
from llm2clip.utils.remote_path import local_copy, open_path

# Sidecars that a reader keeps open, and the share of those it opens whose checksum it compares: one in so many.
KEPT_OPEN = 64
SAMPLED = 16
# Manifests that are read at the same time, since remote ones take a while each.
MANIFESTS_AT_ONCE = 16
# Of the parts of a file.
PARTS_OPEN = 8


class Sidecar(CaptionEmbeddings):
    """The embeddings of the captions of one shard, mapped into memory."""

    def __init__(self, path: Path, manifest: SidecarManifest) -> None:
        shape = manifest.captions, manifest.encoder["hidden_size"]
        super().__init__(path, manifest.cache_manifest(), [read_shard(path, *shape, f"delete it and {REMEDY}")])

    def shard_path(self, number: int) -> Path:
        return self.path


class CheckedSidecars(NamedTuple):
    """What the manifests of all shards of a source say: the encoder, as the manifest of a cache, and rows by shard."""

    encoder: CacheManifest
    row_counts: list[int]


class SourceSidecars:
    """The sidecars of all shards of a source, for reading beside them.

    Args:
        folder: Folder of the sidecars.
        shards: The shards, in their order.
        row_counts: Rows of each shard, from [`SourceSidecars.check`]; None leaves it to readers to count files.
    """

    def __init__(
        self, folder: str | Path, shards: Sequence[SourceShard], row_counts: Sequence[int] | None = None
    ) -> None:
        self.folder, self.shards, self.row_counts = SidecarFolder(folder), list(shards), row_counts
        self._open: OrderedDict[int, Sidecar | PartedSidecar] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files itself.
        return {**self.__dict__, "_open": OrderedDict()}

    def check(self, columns: Sequence[str]) -> CheckedSidecars:
        """Check that all shards have sidecars of one encoder with the captions of these columns.

        Raises:
            MissingCaptionError: A shard has no sidecar, or one without a column.
            CacheMismatchError: Sidecars were made by different encoders.
            CacheDamagedError: A manifest is damaged.
        """
        first: SidecarManifest | None = None
        missing: list[str] = []
        row_counts = []

        def described(shard: SourceShard) -> tuple[list[SourceShard], list[SidecarManifest], list[str]]:
            parts = self.folder.parts(shard)
            manifests = [SidecarManifest.read(self.folder.manifest_path(part)) for part in parts]
            return parts, manifests, [fault for found in manifests if (fault := _misfit(found, shard, columns))]

        with ThreadPoolExecutor(MANIFESTS_AT_ONCE) as pool:
            all_described = list(pool.map(described, self.shards))
        for shard, (parts, manifests, faults) in zip(self.shards, all_described, strict=True):
            missing += (faults or gaps(shard.name, [part.part for part in parts]))[:1]
            row_counts.append(sum(manifest.rows for manifest in manifests))
            for part, manifest in zip(parts, manifests, strict=True):
                first = first or manifest
                if manifest.encoder != first.encoder:
                    one, other = first.encoder, manifest.encoder
                    name = next(
                        name
                        for name in (*one, *other)
                        if (name in one, one.get(name)) != (name in other, other.get(name))
                    )
                    raise CacheMismatchError(
                        f"{self.folder.manifest_path(part)} has {name} {other.get(name)!r}, but the sidecar of "
                        f"{first.source} has {one.get(name)!r}. Embed the source again, into one folder."
                    )
        if missing or first is None:
            shown = "; ".join(missing[:3]) or "there are no shards"
            raise MissingCaptionError(
                f"the sidecars in {self.folder.folder} do not fit {len(missing)} of {len(self.shards)} shards: "
                f"{shown}. {REMEDY[0].upper()}{REMEDY[1:]}."
            )
        return CheckedSidecars(first.cache_manifest(), row_counts)

    def open(self, number: int, epoch: int = 0) -> Sidecar | PartedSidecar:
        """Open the sidecar of a shard; the last ones stay open. One of sixteen is compared with its checksum.

        Raises:
            FileNotFoundError: There is none.
            CacheDamagedError: It is not the file that its manifest describes.
        """
        found = self._open.pop(number, None)
        if found is None:
            parts = self.folder.parts(self.shards[number]) or [self.shards[number]]
            whole = len(parts) == 1 and parts[0].part is None
            found = (
                self._open_part(epoch, parts[0]) if whole else PartedSidecar(parts, partial(self._open_part, epoch))
            )
        self._open[number] = found
        if len(self._open) > KEPT_OPEN:
            self._open.popitem(last=False)
        return found

    def _open_part(self, epoch: int, shard: SourceShard) -> Sidecar:
        path, manifest = self.folder.rows_path(shard), SidecarManifest.read(self.folder.manifest_path(shard))
        sampled = stable_seed("sidecar", epoch, stem_of(shard)) % SAMPLED == 0
        with local_copy(path) as local:
            if sampled and sha256(local) != manifest.checksum:
                raise CacheDamagedError(f"{path} is not what its manifest describes: delete it and {REMEDY}.")
            return Sidecar(local, manifest)  # which stays mapped, also without the file


class PartedSidecar:
    """The sidecars of the parts of one file, which are opened when a caption of theirs is looked up.

    Args:
        parts: The parts, in their order.
        open_part: Opens the sidecar of a part.
    """

    def __init__(self, parts: Sequence[SourceShard], open_part: Callable[[SourceShard], Sidecar]) -> None:
        self._parts, self._open_part = parts, open_part
        self._opened: OrderedDict[int, Sidecar] = OrderedDict()
        self._current = 0

    @property
    def manifest(self) -> CacheManifest:
        """The encoder, as the manifest of a cache with the first part alone."""
        return self._part(0).manifest

    def lookup(self, captions: Sequence[str], dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
        """Return the embeddings of captions; see [`CaptionEmbeddings.lookup`]."""
        return torch.stack([self._find(caption, dtype) for caption in captions])

    def _find(self, caption: str, dtype: torch.dtype | None) -> torch.Tensor:
        # Rows come in their order, so that it is in the part of the last one, or the next.
        for step in range(len(self._parts)):
            number = (self._current + step) % len(self._parts)
            with suppress(MissingCaptionError):
                found = self._part(number).lookup([caption], dtype)[0]
                self._current = number
                return found
        raise MissingCaptionError(f"No sidecar of a part of {self._parts[0].path} has the caption {caption[:80]!r}.")

    def _part(self, number: int) -> Sidecar:
        opened = self._opened.pop(number, None)
        self._opened[number] = self._open_part(self._parts[number]) if opened is None else opened
        if len(self._opened) > PARTS_OPEN:
            self._opened.popitem(last=False)
        return self._opened[number]


def gaps(name: str, parts: Sequence[RowGroups | None]) -> list[str]:
    """Name what no sidecar of a file covers, in words; `parts` are in their order."""
    if not parts:
        return [f"{name} has none"]
    faults, end, total = [], 0, 0
    for part in parts:
        if part is None:
            return []
        if part.start != end:
            kind = "lacks" if part.start > end else "has more than one for"
            faults.append(f"{name} {kind} row groups {min(end, part.start)} to {max(end, part.start) - 1}")
        end, total = part.stop, part.total
    if end != total:
        faults.append(f"{name} lacks row groups {end} to {total - 1}")
    return faults


def _misfit(manifest: SidecarManifest, shard: SourceShard, columns: Sequence[str]) -> str | None:
    """Return what does not fit between a sidecar and its shard, in words."""
    if manifest.source != posixpath.basename(shard.name):
        return f"that of {shard.name} belongs to {manifest.source}"
    if manifest.source_bytes != (size := source_size(shard.path)):
        return f"{shard.name} has {size} bytes, {manifest.source_bytes} when it was embedded"
    absent = [name for name in columns if name not in manifest.caption_columns]
    return f"that of {shard.name} lacks the column {absent[0]}" if absent else None


def stored_encoder(folder: str | Path) -> CacheManifest:
    """Return the encoder that made the embeddings in a folder: a cache, or sidecars.

    Raises:
        FileNotFoundError: There are none.
        CacheError: The manifest is damaged or of another version.
    """
    if not is_sidecar_folder(folder):
        return CacheManifest.read(Path(folder))
    return SidecarManifest.read(next(manifest_paths(open_path(folder)))).cache_manifest()


def is_sidecar_folder(folder: str | Path) -> bool:
    """Tell whether a folder contains sidecars, at any depth, and is not a cache."""
    place = open_path(folder)
    return not (place / MANIFEST).is_file() and next(manifest_paths(place), None) is not None
