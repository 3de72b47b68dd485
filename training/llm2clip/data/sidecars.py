"""Stored embeddings beside the shards of a streamed source.

`00000.tar` has `00000.emb.safetensors` and `00000.emb.manifest`, in the same folder or in one with the same names. The
parts of a large parquet file have the numbers of their rows in the name: `large.00000000-00100000.emb.manifest`. No
list of all captions exists anywhere.
"""

from __future__ import annotations

import glob
import posixpath
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from llm2clip.data.formats import COMPRESSIONS, SourceError
from llm2clip.data.parquet import RowRange
from llm2clip.data.shards import (
    BY_CAPTIONS,
    FILES_AT_ONCE,
    SourceShard,
    read_checksum,
    source_checksum,
    source_size,
)
from llm2clip.files.atomic import require_writable
from llm2clip.files.manifests import Fault, Verified
from llm2clip.files.remote_path import AnyPath, local_copy, open_path
from llm2clip.store.manifest import (
    MANIFEST_SUFFIX,
    ROWS_SUFFIX,
    MissingCaptionError,
    SourceFile,
    StoreDamagedError,
    StoreManifest,
    StoreMismatchError,
    manifest_path,
)
from llm2clip.store.shards import ShardFile, finished_shard
from llm2clip.store.store import SIDECAR, EmbeddingCache

REMEDY = "Run `llm2clip embed` on the source again, which only computes what is missing."


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
        elif self.folder.protocol in ("http", "https"):
            raise ValueError(f"{self.folder} cannot be written; set output_dir to a folder or an object store.")

    def rows_path(self, shard: SourceShard) -> AnyPath:
        """Return the path of the rows of a shard or part."""
        part = "" if shard.part is None else shard.part.suffix
        return self.folder / f"{shard_stem(shard.name)}{part}{SIDECAR}{ROWS_SUFFIX}"

    def manifest_path(self, shard: SourceShard) -> AnyPath:
        """Return the path of the manifest of a shard or part."""
        return manifest_path(self.rows_path(shard))

    def manifests(self, shard: SourceShard) -> dict[SourceShard, StoreManifest]:
        """Read the manifest of a file, or those of its parts in their order; empty if there are none.

        Raises:
            StoreError: A manifest is damaged or of another version.
        """
        whole = shard._replace(part=None)
        with suppress(FileNotFoundError):
            return {whole: StoreManifest.read(self.manifest_path(whole))}
        stem, ending = posixpath.basename(shard_stem(shard.name)), f"{SIDECAR}{MANIFEST_SUFFIX}"
        paths = self.manifest_path(whole).parent.glob(f"{glob.escape(stem)}.*-*{ending}")
        names = re.compile(rf"{re.escape(stem)}\.\d+-\d+{re.escape(ending)}")
        manifests = [StoreManifest.read(path) for path in paths if names.fullmatch(path.name)]
        parts = {part: manifest for manifest in manifests if (part := row_range(manifest))}
        return {whole._replace(part=part): parts[part] for part in sorted(parts)}

    def is_embedded(self, shard: SourceShard, encoder: StoreManifest, columns: Sequence[str]) -> bool:
        """Tell whether a shard, as it is now, has a whole sidecar with the captions of these columns.

        Where other parts of it have changed than captions, the manifest gets its new size.

        Raises:
            StoreMismatchError: Another encoder made it, or it belongs to another file.
        """
        manifest = finished_shard(self.rows_path(shard), encoder)
        if manifest is None:
            return False
        path = self.manifest_path(shard)
        source, name = source_of(manifest, path), posixpath.basename(shard.name)
        advice = "Set another output_dir, or delete that manifest if the other is an earlier version of this data."
        if source.name != name:
            raise StoreMismatchError(f"{path} belongs to {source.name}, and {name} would have the same. {advice}")
        if self._is_of(shard, source):
            if source.bytes != (size := source_size(shard.path)):
                replace(manifest, source=replace(source, bytes=size)).write(path)
            return set(columns) <= set(source.columns)
        if source.path not in (None, self.path_elsewhere(shard)):
            raise StoreMismatchError(
                f"{path} belongs to {source.path}, and {shard.path} would have the same. {advice}"
            )
        return False

    def path_elsewhere(self, shard: SourceShard) -> str | None:
        """Return the path of a shard in another folder than its sidecar."""
        path = open_path(shard.path)
        if isinstance(path, Path):
            path = path.absolute()
        return None if path.parent == self.rows_path(shard).parent else str(path)

    def _is_of(self, shard: SourceShard, source: SourceFile) -> bool:
        """Tell whether a shard has the captions that were embedded of a file.

        Those of a local one that has changed since its manifest was written, or is in another place, are read for
        that.
        """
        path, file = self.manifest_path(shard), open_path(shard.path)
        is_here = source.path in (None, self.path_elsewhere(shard))
        has_size = source.bytes == source_size(shard.path)
        if is_here and has_size:
            if not isinstance(file, Path):
                return True
            # `ctime` changes with the content also where the time of the content is kept.
            changed = max(file.stat().st_mtime_ns, file.stat().st_ctime_ns)
            if isinstance(path, Path) and changed <= path.stat().st_mtime_ns:
                return True
        try:
            fits = source_checksum(shard.path, source.columns, shard.part) == source.checksum
        except SourceError:  # which the reading of the shard says
            return False
        return fits and (has_size or isinstance(file, Path))


class SourceSidecars:
    """The sidecars of all shards of a source, for reading beside them.

    Args:
        folder: Folder of the sidecars.
        shards: The shards, in their order.

    Attributes:
        manifest, row_counts: What [`SourceSidecars.check`] has returned; without, readers count the files.
    """

    manifest: StoreManifest
    row_counts: Sequence[int] | None = None

    def __init__(self, folder: str | Path, shards: Sequence[SourceShard]) -> None:
        self.folder, self.shards = SidecarFolder(folder), list(shards)
        # As long as a lane reads one, so that a remote one is not downloaded for each lane.
        self._open: WeakValueDictionary[int, EmbeddingCache] = WeakValueDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the files itself.
        return {**self.__dict__, "_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_open": WeakValueDictionary()})

    def check(self, columns: Sequence[str]) -> tuple[StoreManifest, list[int]]:
        """Check that all shards have sidecars of one encoder with the captions of these columns.

        Returns:
            The encoder and the format, and the rows of each shard.

        Raises:
            MissingCaptionError: A shard has no sidecar, or one without a column.
            StoreMismatchError: Sidecars were made by different encoders.
            StoreDamagedError: A manifest is damaged.
        """
        first: StoreManifest | None = None
        missing: list[str] = []
        row_counts = []

        def examined(shard: SourceShard) -> tuple[dict[AnyPath, StoreManifest], list[str | None]]:
            parts = self.folder.manifests(shard).items()
            manifests = {self.folder.manifest_path(part): manifest for part, manifest in parts}
            size = source_size(shard.path) if manifests else 0
            return manifests, [_misfit(path, manifest, shard, size, columns) for path, manifest in manifests.items()]

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            by_shard = list(pool.map(examined, self.shards))
        for shard, (manifests, faults) in zip(self.shards, by_shard, strict=True):
            faults.append(_gap(shard.name, [row_range(manifest) for manifest in manifests.values()]))
            missing += list(filter(None, faults))[:1]
            row_counts.append(sum(source_of(manifest, path).rows for path, manifest in manifests.items()))
            for path, manifest in manifests.items():
                first = first or manifest
                if (difference := first.difference(manifest)) is not None:
                    name, expected, other = difference
                    raise StoreMismatchError(
                        f"{path} has {name} {other!r}, but the sidecar of {source_of(first, path).name} has "
                        f"{expected!r}. Embed the source again, into one folder."
                    )
        if missing or first is None:
            shown = "; ".join(missing[:3]) or "there are no shards"
            raise MissingCaptionError(
                f"the sidecars in {self.folder.folder} do not fit {len(missing)} of {len(self.shards)} shards: "
                f"{shown}. {REMEDY}"
            )
        return first, row_counts

    def open(self, number: int) -> EmbeddingCache:
        """Open the sidecar of a shard, or those of its parts; one that is open is shared.

        Raises:
            FileNotFoundError: There is none.
            StoreDamagedError: A file is not the one that its manifest describes.
        """
        if (cache := self._open.get(number)) is not None:
            return cache
        shard = self.shards[number]
        manifests = self.folder.manifests(shard)
        if not manifests:
            raise FileNotFoundError(f"{shard.name} has no embeddings in {self.folder.folder}. {REMEDY}")
        with ExitStack() as copies:
            files = []
            for part, manifest in manifests.items():
                path = self.folder.rows_path(part)
                file = ShardFile.of(copies.enter_context(local_copy(path)), manifest, path)
                file.require_unchanged(always=not isinstance(path, Path))
                files.append(file)
            opened = EmbeddingCache(str(self.folder.rows_path(shard)), manifest, files)
            opened.map()  # which stays, also without the files
        self._open[number] = opened
        return opened


def source_of(manifest: StoreManifest, path: AnyPath) -> SourceFile:
    """Return the file that a sidecar belongs to; `path` is that of the manifest."""
    if manifest.source is None:
        raise StoreDamagedError(f"{path} does not name the file that it belongs to; delete it. {REMEDY}")
    return manifest.source


def row_range(manifest: StoreManifest) -> RowRange | None:
    """Return the part of a parquet file that a sidecar belongs to, or None for a whole file."""
    part = None if manifest.source is None else manifest.source.part
    return None if part is None else RowRange(**part)


def shard_stem(name: str) -> str:
    """Return the name of a shard without its ending."""
    stem, suffix = posixpath.splitext(name)
    return posixpath.splitext(stem)[0] if suffix in COMPRESSIONS else stem


def _gap(name: str, parts: Sequence[RowRange | None]) -> str | None:
    """Return what no sidecar of a file covers, in words; `parts` are in their order."""
    if not parts:
        return f"{name} has none"
    end = total = 0
    for part in parts:
        if part is None:
            return None
        if part.start < end:
            return f"{name} has rows {part.start} to {min(end, part.stop) - 1} twice"
        if part.start > end:
            return f"{name} lacks rows {end} to {part.start - 1}"
        end, total = part.stop, part.total
    return None if end == total else f"{name} lacks rows {end} to {total - 1}"


def _misfit(
    path: AnyPath, manifest: StoreManifest, shard: SourceShard, size: int, columns: Sequence[str]
) -> str | None:
    """Return what does not fit between a sidecar and its shard, which has `size` bytes, in words."""
    source = source_of(manifest, path)
    if source.name != posixpath.basename(shard.name):
        return f"that of {shard.name} belongs to {source.name}"
    if source.bytes != size:
        return f"{shard.name} has {size} bytes, {source.bytes} when it was embedded"
    absent = [name for name in columns if name not in source.columns]
    return f"that of {shard.name} lacks the column {absent[0]}" if absent else None


def verify_sources(folder: AnyPath, manifests: Mapping[AnyPath, StoreManifest], contents: bool = True) -> Verified:
    """Compare the captions of local shards, wherever they are, with the manifests of the sidecars below a folder.

    Args:
        folder: Local, or a URL.
        manifests: All manifests below it.
        contents: Read the captions of the shards.
    """
    verified = Verified()
    for path, manifest in manifests.items() if contents else ():
        source = manifest.source
        if source is None or not (source.checksum or "").startswith(BY_CAPTIONS):
            continue
        if source.path is not None and "://" in source.path:
            continue
        file = path.with_name(source.name) if source.path is None else Path(source.path)
        fix = f"restore that shard, or delete {path} and run `llm2clip embed` on the source again"
        if not isinstance(file, Path) or not file.is_file():
            continue
        try:
            if read_checksum(str(file), source.columns, row_range(manifest)) != source.checksum:
                verified.faults.append(
                    Fault(f"the captions of the shard {file} have changed since they were embedded", fix)
                )
        except (SourceError, OSError) as error:
            verified.faults.append(Fault(f"the captions of the shard {file} cannot be read ({error})", fix))
    for unfinished in sorted(map(str, folder.rglob(f".*{SIDECAR}.*.tmp"))):
        verified.remarks.append(f"{unfinished} is what a run has not finished: it still writes it, or was killed.")
    return verified
