"""Embeddings beside their shards: for each file of a streamed source, a file of embeddings and its manifest.

`00000.tar` has `00000.emb.safetensors`, with the tensors `embeddings` and `keys` of a shard of the cache (see
`cache_files`), and `00000.emb.manifest`, in JSON, which is written last: a shard is embedded when its manifest is
valid. No list of all captions exists anywhere.
"""

from __future__ import annotations

import posixpath
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm2clip.data.records import caption_keys
from llm2clip.data.sampling import stable_seed
from llm2clip.data.shards import SourceShard, source_size
from llm2clip.data.sources import COMPRESSIONS
from llm2clip.embedding.cache_files import (
    MANIFEST,
    CacheDamagedError,
    CacheError,
    CacheManifest,
    CacheMismatchError,
    MissingCaptionError,
    read_shard,
)
from llm2clip.embedding.keyed_rows import KeyedRows
from llm2clip.utils.files import read_json, replace, sha256, temporary_path, write_json

FORMAT = "llm2clip-embedding-sidecar"
FORMAT_VERSION = 1
# Neither name contains the ending of a shard, by which `datasets` would take it for data.
ROWS_SUFFIX, MANIFEST_SUFFIX = ".emb.safetensors", ".emb.manifest"
# Sidecars that a reader keeps open, and the share of those it opens whose checksum it compares: one in so many.
KEPT_OPEN = 64
SAMPLED = 16
REMEDY = "run `llm2clip embed` on the source again, which only computes what is missing"


@dataclass(frozen=True)
class SidecarManifest:
    """The manifest of a sidecar.

    Attributes:
        encoder: The fields of [`CacheManifest`] that an embedding depends on, and the name of the text encoder.
        source: File name of the shard.
        source_bytes, source_checksum: Size of the shard, and its SHA-256; for a remote one what its file system
            states, or None.
        caption_columns: Columns whose captions were embedded.
        rows: Rows of the shard.
        captions: Distinct captions, the rows of the sidecar.
        truncated: Captions that were longer than the encoder's `max_length`.
        reused: Captions whose embeddings were copied from an existing cache.
        bytes, checksum: Size of the sidecar, and its SHA-256.
    """

    encoder: dict[str, Any]
    source: str
    source_bytes: int
    source_checksum: str | None
    caption_columns: list[str]
    rows: int
    captions: int
    truncated: int
    reused: int
    bytes: int
    checksum: str

    def write(self, path: Path) -> None:
        """Write the manifest, after its sidecar."""
        write_json(path, {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> SidecarManifest:
        """Read a manifest.

        Raises:
            FileNotFoundError: There is none.
            CacheDamagedError: It cannot be read, or lacks a field.
            CacheError: It has another format or version.
        """
        try:
            values = read_json(path)
        except ValueError as error:
            raise CacheDamagedError(f"{str(error).rstrip('.')}; delete it and {REMEDY}.") from error
        if (values.get("format"), values.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise CacheError(
                f"{path} is not the manifest of a sidecar of version {FORMAT_VERSION}: its format is "
                f"{values.get('format')!r}, version {values.get('format_version')!r}."
            )
        if missing := {field.name for field in fields(cls)} - set(values):
            raise CacheDamagedError(f"{path} lacks {', '.join(sorted(missing))}; delete it and {REMEDY}.")
        manifest = cls(**{field.name: values[field.name] for field in fields(cls)})
        try:
            manifest.cache_manifest()
        except TypeError as error:
            raise CacheDamagedError(
                f"{path} does not describe an encoder ({error}); delete it and {REMEDY}."
            ) from None
        return manifest

    def cache_manifest(self) -> CacheManifest:
        """Return the manifest of a complete cache with this shard alone."""
        return CacheManifest(**self.encoder, status="complete", shards=[self.captions])


class Sidecar(KeyedRows[CacheManifest]):
    """The embeddings of the captions of one shard, mapped into memory."""

    def __init__(self, path: Path, manifest: SidecarManifest) -> None:
        shape = manifest.captions, manifest.encoder["hidden_size"]
        super().__init__(path, manifest.cache_manifest(), [read_shard(path, *shape, f"delete it and {REMEDY}")])

    def shard_path(self, number: int) -> Path:
        return self.path

    def lookup(self, caption: str) -> torch.Tensor | None:
        """Return the embedding of a caption, (hidden,) in the stored dtype, or None if there is none."""
        row = self.find(caption_keys([caption]))
        return None if row[0] < 0 else self.read(row)[0]


class SidecarFolder:
    """The sidecars of the shards of a source, in the folder of the shards or in one with the same names.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def rows_path(self, shard: SourceShard) -> Path:
        """Return the path of the sidecar of a shard."""
        return self.folder / f"{shard_stem(shard.name)}{ROWS_SUFFIX}"

    def manifest_path(self, shard: SourceShard) -> Path:
        """Return the path of the manifest of a shard's sidecar."""
        return self.folder / f"{shard_stem(shard.name)}{MANIFEST_SUFFIX}"

    def paths(self, shard: SourceShard) -> list[Path]:
        """Return the paths of all files of a shard."""
        return [self.rows_path(shard), self.manifest_path(shard)]

    @contextmanager
    def temporary(self, shard: SourceShard) -> Iterator[Path]:
        """Yield the path of a new file, for the sidecar of a shard; see [`SidecarFolder.publish`]."""
        with temporary_path(self.rows_path(shard)) as temporary:
            yield temporary

    def publish(self, shard: SourceShard, temporary: Path, manifest: SidecarManifest) -> bool:
        """Let a sidecar that is written appear, and then its manifest, without which a shard counts as missing.

        Returns:
            Whether they belong together. They do not if another run has replaced the sidecar meanwhile; then there is
            no manifest.
        """
        rows, described = self.rows_path(shard), self.manifest_path(shard)
        own = temporary.stat()
        described.unlink(missing_ok=True)
        replace(temporary, rows)
        manifest.write(described)
        try:
            found = rows.stat()
        except FileNotFoundError:
            found = None
        if found is not None and (found.st_ino, found.st_mtime_ns) == (own.st_ino, own.st_mtime_ns):
            return True
        described.unlink(missing_ok=True)
        return False

    def is_embedded(self, shard: SourceShard, encoder: CacheManifest, columns: Sequence[str]) -> bool:
        """Tell whether a shard has a whole sidecar with the captions of these columns.

        Raises:
            CacheMismatchError: Another encoder made it.
        """
        try:
            manifest = SidecarManifest.read(self.manifest_path(shard))
            whole = self.rows_path(shard).stat().st_size == manifest.bytes
        except (FileNotFoundError, CacheDamagedError):
            return False
        if manifest.source != posixpath.basename(shard.name):
            raise CacheMismatchError(
                f"{self.manifest_path(shard)} belongs to {manifest.source}, and {shard.name} would have the same. Set "
                "another output_dir."
            )
        for name, value in encoder.identity().items():
            if manifest.encoder.get(name) != value:
                raise CacheMismatchError(
                    f"{self.manifest_path(shard)} was made by {manifest.encoder.get('text_model_name')} with {name} "
                    f"{manifest.encoder.get(name)!r}, but this run has {name} {value!r} ({encoder.encoder}). Choose "
                    "another output_dir, or delete the sidecars to start again."
                )
        return (
            whole
            and manifest.source_bytes == source_size(shard.path)
            and set(columns) <= set(manifest.caption_columns)
        )


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
        self._open: OrderedDict[int, Sidecar] = OrderedDict()

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
        missing, row_counts = [], []
        for shard in self.shards:
            try:
                manifest = SidecarManifest.read(self.folder.manifest_path(shard))
            except FileNotFoundError:
                missing.append(f"{shard.name} has none")
                continue
            fault = _misfit(manifest, shard, columns)
            missing += [fault] if fault else []
            row_counts.append(manifest.rows)
            first = first or manifest
            if manifest.encoder != first.encoder:
                one, other = first.encoder, manifest.encoder
                name = next(name for name in one if one[name] != other.get(name))
                raise CacheMismatchError(
                    f"{self.folder.manifest_path(shard)} has {name} {other.get(name)!r}, but the sidecar of "
                    f"{first.source} has {one[name]!r}. Embed the source again, into one folder."
                )
        if missing or first is None:
            shown = "; ".join(missing[:3]) or "there are no shards"
            raise MissingCaptionError(
                f"the sidecars in {self.folder.folder} do not fit {len(missing)} of {len(self.shards)} shards: "
                f"{shown}. {REMEDY[0].upper()}{REMEDY[1:]}."
            )
        return CheckedSidecars(first.cache_manifest(), row_counts)

    def open(self, number: int, epoch: int = 0) -> Sidecar:
        """Open the sidecar of a shard; the last ones stay open. One of sixteen is compared with its checksum.

        Raises:
            FileNotFoundError: There is none.
            CacheDamagedError: It is not the file that its manifest describes.
        """
        found = self._open.pop(number, None)
        if found is None:
            shard = self.shards[number]
            path, manifest = self.folder.rows_path(shard), SidecarManifest.read(self.folder.manifest_path(shard))
            if stable_seed("sidecar", epoch, shard.name) % SAMPLED == 0 and sha256(path) != manifest.checksum:
                raise CacheDamagedError(f"{path} is not what its manifest describes: delete it and {REMEDY}.")
            found = Sidecar(path, manifest)
        self._open[number] = found
        if len(self._open) > KEPT_OPEN:
            self._open.popitem(last=False)
        return found


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
    return SidecarManifest.read(next(manifest_paths(Path(folder)))).cache_manifest()


def shard_stem(name: str) -> str:
    """Return the name of a shard without its ending."""
    stem, suffix = posixpath.splitext(name)
    return posixpath.splitext(stem)[0] if suffix in COMPRESSIONS else stem


def is_sidecar_folder(folder: str | Path) -> bool:
    """Tell whether a folder contains sidecars, at any depth, and is not a cache."""
    return not (Path(folder) / MANIFEST).is_file() and next(manifest_paths(Path(folder)), None) is not None


def manifest_paths(folder: Path) -> Iterator[Path]:
    """Yield the manifests of the sidecars below a folder."""
    return folder.rglob(f"*{MANIFEST_SUFFIX}")
