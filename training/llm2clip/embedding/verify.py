"""The `llm2clip verify` command: whether stored embeddings are what was written, and what is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.data.shards import source_checksum
from llm2clip.embedding.cache import EmbeddingCache
from llm2clip.embedding.cache_files import MANIFEST, CacheError
from llm2clip.embedding.sidecars import (
    MANIFEST_SUFFIX,
    REMEDY,
    ROWS_SUFFIX,
    Sidecar,
    SidecarManifest,
    manifest_paths,
    shard_stem,
)
from llm2clip.utils.files import sha256
from llm2clip.utils.progress import progress_bar
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

    folder: str = setting("", "Folder of an embedding cache, or of sidecars at any depth.")
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
    folder = Path(config.folder)
    if (folder / MANIFEST).is_file():
        cache = EmbeddingCache.open(folder)
        return {"num_shards": len(cache.manifest.shards), "num_captions": len(cache)}
    manifests = sorted(manifest_paths(folder))
    if not manifests:
        raise FileNotFoundError(f"{folder} contains no embeddings: neither {MANIFEST} nor *{MANIFEST_SUFFIX}.")
    faults: list[str] = []
    captions = 0
    with progress_bar("Verifying shards", len(manifests), "shard") as bar:
        for path in manifests:
            try:
                captions += _verify(path, config.sources)
            except (CacheError, OSError) as error:
                faults.append(str(error))
            bar.update(advance=1)
    faults += _without_manifest(folder)
    for path in sorted(folder.rglob(f".*{SUFFIX_START}*.tmp")):
        logger.warning("%s is what a run has not finished: it still writes it, or was killed.", path)
    for fault in faults[:SHOWN]:
        logger.error(fault)
    if faults:
        more = f", the first {SHOWN} of which are above" if len(faults) > SHOWN else ""
        raise DamagedError(
            f"{len(faults)} faults in the {len(manifests)} sidecars of {folder}{more}. Delete the files they name "
            f"and {REMEDY}."
        )
    return {"num_shards": len(manifests), "num_captions": captions}


def _verify(path: Path, with_source: bool) -> int:
    """Compare a sidecar, and its shard if that lies beside it, with a manifest; return the number of its captions.

    Raises:
        CacheError: They differ.
    """
    manifest = SidecarManifest.read(path)
    rows = path.with_name(path.name.removesuffix(MANIFEST_SUFFIX) + ROWS_SUFFIX)
    sidecar = Sidecar(rows, manifest)
    _compare(rows, "the sidecar", sha256(rows), manifest.checksum)
    sidecar.check_finite()
    source = path.with_name(manifest.source)
    if with_source and source.is_file() and manifest.source_checksum is not None:
        _compare(source, "the shard", str(source_checksum(str(source))), manifest.source_checksum)
    return len(sidecar)


def _compare(path: Path, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise CacheError(f"{name} {path} has changed since it was embedded: its checksum is not that of the manifest.")


def _without_manifest(folder: Path) -> Iterator[str]:
    """Name the sidecars without a manifest, and the shards without a sidecar in folders where others have one."""
    for parent in sorted({path.parent for path in manifest_paths(folder)}):
        embedded = {path.name.removesuffix(MANIFEST_SUFFIX) for path in parent.glob(f"*{MANIFEST_SUFFIX}")}
        kinds = {path.suffix for path in parent.iterdir() if shard_stem(path.name) in embedded}
        for path in sorted(parent.iterdir()):
            if path.name.endswith(ROWS_SUFFIX):
                if path.name.removesuffix(ROWS_SUFFIX) not in embedded:
                    yield f"{path} has no manifest: it was not finished."
            elif path.suffix in kinds and shard_stem(path.name) not in embedded:
                yield f"{path} has no sidecar."
