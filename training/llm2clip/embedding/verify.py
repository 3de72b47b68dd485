"""The `llm2clip verify` command: whether stored embeddings are what was written, and what is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.data.parquet_parts import RowGroups
from llm2clip.data.shards import source_checksum
from llm2clip.embedding.cache import EmbeddingCache
from llm2clip.embedding.cache_files import MANIFEST, CacheError
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
from llm2clip.utils.remote_path import AnyPath, local_copy, open_path
from llm2clip.utils.settings import setting

logger = logging.getLogger(__name__)

SHOWN = 20
# Of the names of sidecars and their manifests.
SUFFIX_START = ".emb."


class DamagedError(ValueError):
    """Stored embeddings are damaged or incomplete."""

    exit_status = 1


@dataclass
class VerifyConfig:
    """Settings of the check."""

    folder: str = setting("", "Folder of an embedding cache, or of sidecars at any depth; of sidecars also a URL.")
    sources: bool = setting(
        True, "Read the shards too that lie beside their sidecars, and compare them with their checksums."
    )


def run(config: VerifyConfig) -> dict[str, Any]:
    """Read all stored embeddings of a folder, and compare them with their checksums.

    Returns:
        The numbers of files and captions.

    Raises:
        FileNotFoundError: The folder contains no embeddings.
        DamagedError: Something is damaged or missing. The message names the files and what mends them; the exit status
            is 1.
    """
    folder = open_path(config.folder)
    if isinstance(folder, Path) and (folder / MANIFEST).is_file():
        cache = EmbeddingCache.open(folder)
        return {"num_shards": len(cache.manifest.shards), "num_captions": len(cache)}
    manifests = sorted(manifest_paths(folder), key=str)
    if not manifests:
        raise FileNotFoundError(f"{folder} contains no embeddings: neither {MANIFEST} nor *{MANIFEST_SUFFIX}.")
    faults: list[str] = []
    read: dict[AnyPath, SidecarManifest] = {}
    with progress_bar("Verifying shards", len(manifests), "shard") as bar:
        for path in manifests:
            try:
                read[path] = SidecarManifest.read(path)
                _verify(path, read[path], config.sources)
            except (CacheError, OSError) as error:
                faults.append(str(error))
            bar.update(advance=1)
    faults += _without_manifest(folder, read)
    for unfinished in sorted(map(str, folder.rglob(f".*{SUFFIX_START}*.tmp"))):
        logger.warning("%s is what a run has not finished: it still writes it, or was killed.", unfinished)
    for fault in faults[:SHOWN]:
        logger.error(fault)
    if faults:
        more = f", the first {SHOWN} of which are above" if len(faults) > SHOWN else ""
        raise DamagedError(
            f"{len(faults)} faults in the {len(manifests)} sidecars of {folder}{more}. Delete the files they name "
            f"and {REMEDY}."
        )
    return {"num_shards": len(manifests), "num_captions": sum(manifest.captions for manifest in read.values())}


def _verify(path: AnyPath, manifest: SidecarManifest, with_source: bool) -> None:
    """Compare a sidecar, and its shard if that lies beside it, with a manifest.

    Raises:
        CacheError: They differ.
    """
    rows = path.with_name(path.name.removesuffix(MANIFEST_SUFFIX) + ROWS_SUFFIX)
    with local_copy(rows) as local:
        sidecar = Sidecar(local, manifest)
        _compare(rows, "the sidecar", sha256(local), manifest.checksum)
        sidecar.check_finite()
    source = path.with_name(manifest.source)
    if with_source and isinstance(source, Path) and source.is_file() and manifest.source_checksum is not None:
        found = source_checksum(str(source), manifest.row_groups)
        _compare(source, "the shard", str(found), manifest.source_checksum)


def _compare(path: AnyPath, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise CacheError(f"{name} {path} has changed since it was embedded: its checksum is not that of the manifest.")


def _without_manifest(folder: AnyPath, read: Mapping[AnyPath, SidecarManifest]) -> Iterator[str]:
    """Name the sidecars without a manifest, and in folders where others have one the shards and parts without.

    Args:
        read: The manifests that can be read.
    """
    for parent in sorted({path.parent for path in manifest_paths(folder)}, key=str):
        embedded = {path.name.removesuffix(MANIFEST_SUFFIX) for path in parent.glob(f"*{MANIFEST_SUFFIX}")}
        parts: dict[str, list[RowGroups | None]] = {}
        for path, manifest in read.items():
            if path.parent == parent:
                parts.setdefault(manifest.source, []).append(manifest.row_groups)
        for source, found in parts.items():
            yield from gaps(str(parent / source), sorted(found, key=lambda part: part or ()))
        kinds = {Path(source).suffix for source in parts}
        inside: list[AnyPath] = sorted(parent.iterdir(), key=str)
        for path in inside:
            if path.name.endswith(ROWS_SUFFIX):
                if path.name.removesuffix(ROWS_SUFFIX) not in embedded:
                    yield f"{path} has no manifest: it was not finished."
            elif path.suffix in kinds and shard_stem(path.name) not in embedded and path.name not in parts:
                yield f"{path} has no sidecar."
