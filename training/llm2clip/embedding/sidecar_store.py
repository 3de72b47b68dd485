"""Looking embeddings up in a folder of sidecars by caption, through an index on disk: no list of keys in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from llm2clip.data.shared_files import shared_file
from llm2clip.embedding.cache import EmbeddingCache
from llm2clip.embedding.cache_files import CacheDamagedError, CacheManifest, CacheMismatchError, Shard, read_shard
from llm2clip.embedding.keyed_rows import KeyIndex
from llm2clip.embedding.sidecar_files import MANIFEST_SUFFIX, REMEDY, ROWS_SUFFIX, SidecarManifest, manifest_paths
from llm2clip.embedding.sidecars import is_sidecar_folder
from llm2clip.utils.files import MappedFile, allocate

# Of the index file.
VERSION = 1
# The keys are sorted in so many parts, of which one is in memory.
BUCKETS = 256
ENTRY = np.dtype([("high", "<i8"), ("low", "<i8"), ("place", "<i8")])


class SidecarStore:
    """The embeddings of all sidecars in a local folder, by caption key.

    Args:
        path: The folder.
        encoder: The text encoder, as the manifest of a cache.
        shards: The sidecars.
        index: Finds the place of a key: the number of a sidecar in its upper and that of the row in its lower half.
    """

    def __init__(self, path: Path, encoder: CacheManifest, shards: Sequence[Shard], index: KeyIndex) -> None:
        self.path, self.manifest = path, encoder
        self._index, self._shards = index, shards
        self._embeddings = [shard.embeddings() for shard in shards]
        self._files = [MappedFile(shard.path) for shard in shards]

    @classmethod
    def open(cls, folder: str | Path) -> SidecarStore:
        """Open the sidecars of a folder. The first process on a machine that opens them writes their index.

        Raises:
            CacheMismatchError: They were made by different encoders.
            CacheDamagedError: A manifest is damaged, or a sidecar is missing or truncated.
        """
        paths = [path for path in sorted(manifest_paths(Path(folder)), key=str) if isinstance(path, Path)]
        manifests = [SidecarManifest.read(path) for path in paths]
        shards = []
        for path, manifest in zip(paths, manifests, strict=True):
            if manifest.encoder != manifests[0].encoder:
                raise CacheMismatchError(f"{paths[0]} and {path} are of different encoders; reuse those of one.")
            rows = path.with_name(path.name.removesuffix(MANIFEST_SUFFIX) + ROWS_SUFFIX)
            shape = manifest.captions, manifest.encoder["hidden_size"]
            shards.append(read_shard(rows, *shape, f"delete it and {REMEDY}"))
        identity = {"version": VERSION, "sidecars": [manifest.checksum for manifest in manifests]}
        index = shared_file("sidecar-keys", identity, lambda place: _write_index(place, shards))
        return cls(Path(folder), manifests[0].cache_manifest(), shards, _open_index(index))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the places of the rows with the given keys, (n,) int64; -1 for an unknown key."""
        return self._index.find(keys)

    def read(self, places: np.ndarray) -> torch.Tensor:
        """Return rows by their places, (n, hidden) in the stored dtype.

        Raises:
            CacheDamagedError: A row is not finite, or its sidecar has been cut short.
        """
        rows = torch.empty((len(places), self.manifest.hidden_size), dtype=getattr(torch, self.manifest.dtype))
        numbers = places >> 32
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            if self._files[number].is_cut():
                raise CacheDamagedError(f"{self._files[number].path} was cut short while it was open; {REMEDY}.")
            found = self._embeddings[number][torch.from_numpy(places[here] & 0xFFFFFFFF)]
            if not torch.isfinite(found).all():
                raise CacheDamagedError(
                    f"{self._shards[number].path} has a row that is not finite; verify the folder."
                )
            rows[torch.from_numpy(here)] = found
        return rows


def open_reused(path: str) -> EmbeddingCache | SidecarStore:
    """Open the embeddings that a run copies: a cache, or a folder of sidecars.

    Raises:
        CacheError: They are damaged, incomplete or of different encoders.
    """
    return SidecarStore.open(path) if is_sidecar_folder(path) else EmbeddingCache.open(path, verify=False)


def _write_index(path: Path, shards: Sequence[Shard]) -> None:
    """Write the keys of shards, sorted, and where their rows are: all first halves, then all second halves, places."""
    total = sum(shard.shape[0] for shard in shards)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        for number, shard in enumerate(shards):
            _scatter(Path(folder), shard.keys(), number)
        columns = np.memmap(path, dtype="<i8", mode="w+", shape=(3, total)) if total else np.empty((3, 0))
        if not total:
            path.touch()
        else:
            allocate(path, path.stat().st_size)
        start = 0
        for entries in _sorted_buckets(Path(folder)):
            for column, name in enumerate(("high", "low", "place")):
                columns[column, start : start + len(entries)] = entries[name]
            start += len(entries)


def _scatter(folder: Path, keys: np.ndarray, number: int) -> None:
    """Append the keys of a shard to the files of their buckets."""
    entries = np.empty(len(keys), dtype=ENTRY)
    entries["high"], entries["low"] = keys[:, 0], keys[:, 1]
    entries["place"] = np.arange(len(keys)) | number << 32
    entries = entries[np.argsort(entries["high"], kind="stable")]
    buckets, starts = np.unique((entries["high"] >> 56) + BUCKETS // 2, return_index=True)
    for bucket, start, stop in zip(buckets, starts, np.append(starts, len(entries))[1:], strict=True):
        with (folder / str(bucket)).open("ab") as file:
            file.write(entries[start:stop].tobytes())


def _sorted_buckets(folder: Path) -> Iterator[np.ndarray]:
    for bucket in range(BUCKETS):
        path = folder / str(bucket)
        if path.exists():
            entries = np.fromfile(path, dtype=ENTRY)
            yield entries[np.argsort(entries["high"], kind="stable")]


def _open_index(path: Path) -> KeyIndex:
    if not path.stat().st_size:
        return KeyIndex(np.empty((0, 2), np.int64))
    columns = np.memmap(path, dtype="<i8", mode="r").reshape(3, -1)
    return KeyIndex.of_sorted(columns[0], columns[1], columns[2])
