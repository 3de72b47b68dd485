"""Files of embeddings beside their shards: for each file of a streamed source, its embeddings and a manifest.

`00000.tar` has `00000.emb.safetensors`, with the tensors `embeddings` and `keys` of a shard of the cache (see
`cache_files`), and `00000.emb.manifest`, in JSON, which is written last: a shard is embedded when its manifest is
valid. The parts of a large parquet file have the numbers of their row groups in the name:
`large.00000-00008.emb.manifest`. No list of all captions exists anywhere.
"""

from __future__ import annotations

import glob
import posixpath
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

from llm2clip.data.opened_table import COMPRESSIONS
from llm2clip.data.parquet_parts import RowGroups
from llm2clip.data.shards import SourceShard, source_checksum, source_size
from llm2clip.embedding.cache_files import CacheDamagedError, CacheError, CacheManifest, CacheMismatchError
from llm2clip.utils.files import read_json, replace, require_writable, temporary_path, write_json
from llm2clip.utils.manifests import is_intact, sealed
from llm2clip.utils.remote_path import READ_ONLY, AnyPath, open_path, protocols, size_of
from llm2clip.utils.settings import build_config

FORMAT = "llm2clip-embedding-sidecar"
FORMAT_VERSION = 1
# Neither name contains the ending of a shard, by which `datasets` would take it for data.
ROWS_SUFFIX, MANIFEST_SUFFIX = ".emb.safetensors", ".emb.manifest"
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
        part: Of a part of a parquet file the fields of [`RowGroups`]; `rows` and `source_checksum` are then those of
            the part.
        source_path: Path or URL of the shard if the sidecar is in another folder, where another source could have a
            shard of the same name.
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
    part: dict[str, int] | None = None
    source_path: str | None = None

    def write(self, path: AnyPath) -> None:
        """Write the manifest, after its sidecar."""
        write_json(path, sealed({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}))

    @classmethod
    def read(cls, path: AnyPath) -> SidecarManifest:
        """Read a manifest.

        Raises:
            FileNotFoundError: There is none.
            CacheDamagedError: It cannot be read, lacks a field, or has changed.
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
        names = {field.name for field in fields(cls)}
        if missing := names - set(values):
            raise CacheDamagedError(f"{path} lacks {', '.join(sorted(missing))}; delete it and {REMEDY}.")
        try:
            manifest = build_config(cls, {name: values[name] for name in names}, str(path))
            manifest.cache_manifest(), manifest.row_groups
            if not manifest.source or posixpath.basename(manifest.source) != manifest.source:
                raise ValueError(f"source is {manifest.source!r}, and not the name of a file")
        except (TypeError, ValueError) as error:
            raise CacheDamagedError(
                f"{path} does not describe an encoder or a part ({str(error).rstrip('.')}); delete it and {REMEDY}."
            ) from None
        if not is_intact(values):
            raise CacheDamagedError(f"{path} has changed since it was written; delete it and {REMEDY}.")
        return manifest

    @property
    def row_groups(self) -> RowGroups | None:
        """The part of a parquet file, or None for a whole file."""
        return None if self.part is None else RowGroups(**self.part)

    def cache_manifest(self) -> CacheManifest:
        """Return the manifest of a complete cache with this shard alone."""
        fields = {**self.encoder, "status": "complete", "shards": [self.captions]}
        return build_config(CacheManifest, fields, "the encoder")


class SidecarFolder:
    """The sidecars of the shards of a source, in the folder of the shards or in one with the same names.

    Args:
        folder: The folder, local or a URL.
    """

    def __init__(self, folder: str | AnyPath) -> None:
        self.folder = open_path(folder)

    def require_writable(self) -> None:
        """Check that files can be written, before they cost hours.

        Raises:
            ValueError: They cannot, because that file system is read-only.
            OSError: They cannot, because the folder is read-only, or is none.
        """
        if isinstance(self.folder, Path):
            require_writable(self.folder)
        elif READ_ONLY & set(protocols(self.folder.files)):
            raise ValueError(f"{self.folder} cannot be written; set output_dir to a folder or an object store.")

    def rows_path(self, shard: SourceShard) -> AnyPath:
        """Return the path of the sidecar of a shard."""
        return self.folder / f"{stem_of(shard)}{ROWS_SUFFIX}"

    def manifest_path(self, shard: SourceShard) -> AnyPath:
        """Return the path of the manifest of a shard's sidecar."""
        return self.folder / f"{stem_of(shard)}{MANIFEST_SUFFIX}"

    def parts(self, shard: SourceShard) -> list[SourceShard]:
        """Return the parts of a file that have manifests, in their order; the file itself if that has one, or none.

        Raises:
            CacheError: A manifest is damaged or of another version.
        """
        whole = shard._replace(part=None)
        if self.manifest_path(whole).is_file():
            return [whole]
        stem = posixpath.basename(shard_stem(shard.name))
        found = self.manifest_path(whole).parent.glob(f"{glob.escape(stem)}.*-*{MANIFEST_SUFFIX}")
        names = re.compile(rf"{re.escape(stem)}\.\d+-\d+{re.escape(MANIFEST_SUFFIX)}")
        parts = [SidecarManifest.read(path).row_groups for path in found if names.fullmatch(path.name)]
        return [whole._replace(part=part) for part in sorted(part for part in parts if part)]

    def paths(self, shard: SourceShard) -> list[Path]:
        """Return the local paths of all files of a shard."""
        return [path for path in (self.rows_path(shard), self.manifest_path(shard)) if isinstance(path, Path)]

    @contextmanager
    def temporary(self, shard: SourceShard) -> Iterator[Path]:
        """Yield the path of a new file, for the sidecar of a shard; see [`SidecarFolder.publish`]."""
        rows = self.rows_path(shard)
        if isinstance(rows, Path):
            with temporary_path(rows) as temporary:
                yield temporary
        else:
            with tempfile.TemporaryDirectory(prefix="llm2clip-") as folder:
                yield Path(folder, rows.name)

    def publish(self, shard: SourceShard, temporary: Path, manifest: SidecarManifest) -> bool:
        """Let a sidecar that is written appear, and then its manifest, without which a shard counts as missing.

        Returns:
            Whether they belong together. They do not if another run has replaced the sidecar meanwhile; then there is
            no manifest. Of remote files this is not known.
        """
        rows, described = self.rows_path(shard), self.manifest_path(shard)
        own = temporary.stat()
        described.unlink(missing_ok=True)
        if not isinstance(rows, Path):
            rows.put(temporary)
            manifest.write(described)
            return True
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
        """Tell whether a shard, as it is now, has a whole sidecar with the captions of these columns.

        Raises:
            CacheMismatchError: Another encoder made it.
        """
        try:
            manifest = SidecarManifest.read(self.manifest_path(shard))
            whole = size_of(self.rows_path(shard)) == manifest.bytes
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
        if manifest.part != part_fields(shard) or not self._is_of(shard, manifest):
            self._refuse_another(shard, manifest)
            return False
        return whole and set(columns) <= set(manifest.caption_columns)

    def source_path(self, shard: SourceShard) -> str | None:
        """Return what the manifest of a shard has as `source_path`."""
        path = open_path(shard.path)
        if isinstance(path, Path):
            path = path.absolute()
        return None if path.parent == self.rows_path(shard).parent else str(path)

    def _is_of(self, shard: SourceShard, manifest: SidecarManifest) -> bool:
        """Tell whether a shard is what was embedded: tars with other captions often have the same size.

        A local one that is newer than its manifest, or in another place, is read for that, once if the manifest can be
        written.
        """
        if manifest.source_bytes != source_size(shard.path):
            return False
        described, source, place = self.manifest_path(shard), open_path(shard.path), self.source_path(shard)
        is_moved = manifest.source_path is not None and manifest.source_path != place
        if not isinstance(source, Path):
            stated = source_checksum(shard.path, shard.part) if is_moved else manifest.source_checksum
            return stated == manifest.source_checksum
        is_newer = isinstance(described, Path) and source.stat().st_mtime_ns > described.stat().st_mtime_ns
        if not (is_moved or is_newer):
            return True
        if source_checksum(shard.path, shard.part) != manifest.source_checksum:
            return False
        with suppress(OSError):
            replace_fields(manifest, source_path=place).write(described)
        return True

    def _refuse_another(self, shard: SourceShard, manifest: SidecarManifest) -> None:
        """Raise CacheMismatchError if the sidecar belongs to a shard of the same name that is there too."""
        other = manifest.source_path
        if other is None or other == self.source_path(shard):
            return
        try:
            is_there = source_size(other) == manifest.source_bytes
        except (OSError, ValueError):
            is_there = False
        if is_there:
            raise CacheMismatchError(
                f"{self.manifest_path(shard)} belongs to {other}, and {shard.path} would have the same. Set another "
                "output_dir, or delete that manifest if the other is an earlier version of this data."
            )


def stem_of(shard: SourceShard) -> str:
    """Return what the names of the files of a shard or part begin with."""
    return shard_stem(shard.name) + ("" if shard.part is None else shard.part.suffix)


def part_fields(shard: SourceShard) -> dict[str, int] | None:
    """Return what the manifest of a shard says about its part."""
    return None if shard.part is None else shard.part._asdict()


def shard_stem(name: str) -> str:
    """Return the name of a shard without its ending."""
    stem, suffix = posixpath.splitext(name)
    return posixpath.splitext(stem)[0] if suffix in COMPRESSIONS else stem


def manifest_paths(folder: AnyPath) -> Iterator[AnyPath]:
    """Yield the manifests of the sidecars below a folder."""
    return iter(folder.rglob(f"*{MANIFEST_SUFFIX}"))
