"""Verification of stored embeddings: whether they are what was written, and what is missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llm2clip.data.parquet_parts import RowGroups
from llm2clip.data.shards import source_checksum
from llm2clip.embedding.cache_files import (
    CacheError,
    StoreManifest,
    open_shard,
    require_unchanged,
    shard_name,
)
from llm2clip.embedding.keyed_rows import KeyedRows
from llm2clip.embedding.sidecar_files import (
    MANIFEST_SUFFIX,
    REMEDY,
    ROWS_SUFFIX,
    SidecarManifest,
    manifest_paths,
    shard_stem,
)
from llm2clip.embedding.sidecars import Sidecar, gaps
from llm2clip.utils.files import sha256
from llm2clip.utils.progress import progress_bar
from llm2clip.utils.remote_path import AnyPath, local_copy
from llm2clip.utils.verified import Fault, Verified

# Of the names of sidecars and their manifests.
SUFFIX_START = ".emb."
CHANGED = "{} has changed since it was embedded: its checksum is not that of the manifest"


class _CacheShard(KeyedRows[StoreManifest]):
    """The rows of one shard of a cache."""

    def __init__(self, folder: Path, manifest: StoreManifest, number: int) -> None:
        self._file = folder / shard_name(number)
        own = replace(manifest, shards=[manifest.shards[number]])
        super().__init__(folder, own, [open_shard(folder, manifest, number)])

    def shard_path(self, number: int) -> Path:
        return self._file


def verify_cache(folder: Path, kind: type[StoreManifest]) -> Verified:
    """Read all shards of a cache, and compare them with their checksums.

    Args:
        kind: The class of its manifest.
    """
    found = Verified()
    try:
        manifest = kind.read(folder)
    except (CacheError, OSError) as error:
        found.faults.append(Fault(str(error), f"delete {folder} and {kind.REMEDY}"))
        return found
    if manifest.status != "complete":
        found.faults.append(Fault(f"the build of {folder} was interrupted", f"{kind.REMEDY}, which goes on with it"))
        return found
    found.counts = Counter({"num_shards": len(manifest.shards), f"num_{kind.UNIT}s": manifest.num_rows})
    numbers = range(len(manifest.shards))
    with progress_bar("Verifying shards", len(numbers), "shard") as bar:
        for number in numbers:
            try:
                _CacheShard(folder, manifest, number).check_finite()
                require_unchanged(folder, manifest, number)
            except (CacheError, OSError) as error:
                mend = f"delete {folder / shard_name(number)} and {kind.REMEDY}, which only computes what is missing"
                found.faults.append(Fault(str(error).partition(";")[0], mend))
            bar.update(advance=1)
    return found


def verify_sidecars(folder: AnyPath, sources: bool = True) -> Verified:
    """Read all sidecars below a folder, and compare them with their checksums.

    Args:
        folder: Local, or a URL.
        sources: Read the shards too that lie beside their sidecars, and compare them with their checksums.
    """
    manifests = sorted(manifest_paths(folder), key=str)
    found = Verified()
    read: dict[AnyPath, SidecarManifest] = {}
    with progress_bar("Verifying shards", len(manifests), "shard") as bar:
        for path in manifests:
            embed_again = f"delete {path} and {REMEDY}"
            try:
                read[path] = SidecarManifest.read(path)
                _verify(path, read[path])
            except (CacheError, OSError) as error:
                found.faults.append(Fault(str(error).partition("; delete")[0], embed_again))
            if sources and path in read and (changed := _changed_source(path, read[path])):
                found.faults.append(Fault(changed, f"restore that shard, or {embed_again}"))
            bar.update(advance=1)
    found.faults += [Fault(missing, REMEDY) for missing in _without_manifest(folder, read, found)]
    for unfinished in sorted(map(str, folder.rglob(f".*{SUFFIX_START}*.tmp"))):
        found.remarks.append(f"{unfinished} is what a run has not finished: it still writes it, or was killed.")
    captions = sum(manifest.captions for manifest in read.values())
    found.counts = Counter({"num_shards": len(manifests), "num_captions": captions})
    return found


def _verify(path: AnyPath, manifest: SidecarManifest) -> None:
    """Compare a sidecar with its manifest.

    Raises:
        CacheError: They differ.
    """
    rows = path.with_name(path.name.removesuffix(MANIFEST_SUFFIX) + ROWS_SUFFIX)
    with local_copy(rows) as local:
        sidecar = Sidecar(local, manifest)
        if sha256(local) != manifest.checksum:
            raise CacheError(CHANGED.format(f"the sidecar {rows}"))
        sidecar.check_finite()


def _changed_source(path: AnyPath, manifest: SidecarManifest) -> str | None:
    """Compare the shard that lies beside a sidecar with its manifest; return what differs, in words."""
    source = path.with_name(manifest.source)
    if not isinstance(source, Path) or not source.is_file() or manifest.source_checksum is None:
        return None
    try:
        found = source_checksum(str(source), manifest.row_groups)
    except (OSError, ValueError) as error:
        return f"the shard {source} cannot be read: {error}"
    return None if str(found) == manifest.source_checksum else CHANGED.format(f"the shard {source}")


def _without_manifest(folder: AnyPath, read: Mapping[AnyPath, SidecarManifest], found: Verified) -> Iterator[str]:
    """Name the sidecars without a manifest, and the shards and parts that have none while others of their source do.

    Args:
        read: The manifests that can be read.
        found: Takes a remark on shards that may belong to another source.
    """
    for parent in sorted({path.parent for path in manifest_paths(folder)}, key=str):
        embedded = {path.name.removesuffix(MANIFEST_SUFFIX) for path in parent.glob(f"*{MANIFEST_SUFFIX}")}
        here = [manifest for path, manifest in read.items() if path.parent == parent]
        parts: dict[str, list[RowGroups | None]] = {}
        for manifest in here:
            parts.setdefault(manifest.source, []).append(manifest.row_groups)
        for source, groups in parts.items():
            yield from gaps(str(parent / source), sorted(groups, key=lambda part: part or ()))
        kinds, series, others = {Path(source).suffix for source in parts}, set(map(_series, parts)), list[AnyPath]()
        inside: list[AnyPath] = sorted(parent.iterdir(), key=str)
        for path in inside:
            if path.name.endswith(ROWS_SUFFIX):
                if path.name.removesuffix(ROWS_SUFFIX) not in embedded:
                    yield f"{path} has no manifest: it was not finished."
            elif path.suffix in kinds and shard_stem(path.name) not in embedded and path.name not in parts:
                if _series(path.name) in series:
                    yield f"{path} has no sidecar."
                else:
                    others.append(path)
        if others:
            more = f", nor do {len(others) - 1} more" if len(others) > 1 else ""
            found.remarks.append(
                f"{others[0]} has no sidecar{more}; since the names of the shards that do are of another kind, it may "
                "be of another split or source."
            )
        named = {path.name.removesuffix(ROWS_SUFFIX) for path in inside}
        yield from _not_embedded_elsewhere(parent, here, embedded | named)


def _series(name: str) -> str:
    """Return a name without the numbers by which the shards of a source differ."""
    return re.sub(r"[0-9]+", "0", name)


def _not_embedded_elsewhere(
    parent: AnyPath, manifests: Sequence[SidecarManifest], known: Container[str]
) -> Iterator[str]:
    """Name the shards without a sidecar in local folders of shards whose sidecars lie in `parent`.

    Args:
        known: Names without endings of shards that have one, or are named already.
    """
    places: dict[Path, set[str]] = {}
    for manifest in manifests:
        if manifest.source_path is not None and "://" not in manifest.source_path:
            places.setdefault(Path(manifest.source_path).parent, set()).add(manifest.source)
    for place, sources in sorted(places.items()):
        series = set(map(_series, sources))
        try:
            names = sorted(path.name for path in place.iterdir() if _series(path.name) in series and path.is_file())
        except OSError:  # the data has been moved
            continue
        missing = [name for name in names if name not in sources and shard_stem(name) not in known]
        if missing:
            count = "1 shard" if len(missing) == 1 else f"{len(missing)} shards"
            yield f"{place / missing[0]} has no sidecar in {parent} ({count} of {len(names)} in that folder)."
