"""Reading a store: rows mapped into memory, found by their keys; and embeddings of captions, by the exact text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from llm2clip.files.remote_path import AnyPath, open_path
from llm2clip.files.shared_files import shared_file
from llm2clip.models.embeddings import finite_rows
from llm2clip.store.manifest import (
    KINDS,
    MANIFEST_SUFFIX,
    ROWS_SUFFIX,
    VERSION,
    MissingCaptionError,
    StoreDamagedError,
    StoreError,
    StoreIncompleteError,
    StoreManifest,
    StoreMismatchError,
    rows_path,
)
from llm2clip.store.shards import ShardFile

StoreT = TypeVar("StoreT", bound="Store")

# Names the shards of a folder, and where each row is. Written last.
INDEX = f"index{MANIFEST_SUFFIX}"
# Shards that lie beside those of a data set. Neither name has the ending of one, by which `datasets` would take it
# for data.
SIDECAR = ".emb"
SIDECAR_MANIFESTS = f"*{SIDECAR}{MANIFEST_SUFFIX}"
# The columns of an index.
COLUMNS = ("high", "low", "rows")
# Integers by the bytes of a stored value.
INTEGERS = {2: torch.int16, 4: torch.int32}
# The bits of the exponent of a stored value, which are all set where it is not finite.
EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}


class KeyIndex:
    """Finds the rows of keys by binary search.

    Args:
        high, low: (n,) int64, the halves of the keys, sorted by the first; those that repeat are found at their first
            row.
        rows: (n,), what [`KeyIndex.find`] returns.
    """

    def __init__(self, high: np.ndarray, low: np.ndarray, rows: np.ndarray) -> None:
        self._high, self._low, self._rows = high, low, rows

    @classmethod
    def of(cls, keys: np.ndarray) -> KeyIndex:
        """Return the index of keys, (n, 2) int64, in memory: 20 bytes a key."""
        order = np.argsort(keys[:, 0], kind="stable")
        rows = order.astype(np.uint32) if len(order) < 2**32 else order
        return cls(keys[order, 0], keys[order, 1], rows)

    def columns(self) -> dict[str, Tensor]:
        """Return what an index is made of, (n,) int64 each."""
        columns = zip(COLUMNS, (self._high, self._low, self._rows), strict=True)
        return {name: torch.from_numpy(column.astype(np.int64)) for name, column in columns}

    def __len__(self) -> int:
        return len(self._high)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the row of each key, (m,) int64; -1 for an unknown key."""
        rows = np.full(len(keys), -1, dtype=np.int64)
        position = np.searchsorted(self._high, keys[:, 0])
        pending = np.arange(len(keys))
        while len(pending):  # more than one round only if first halves collide
            pending = pending[position[pending] < len(self)]
            pending = pending[self._high[position[pending]] == keys[pending, 0]]
            hit = self._low[position[pending]] == keys[pending, 1]
            rows[pending[hit]] = self._rows[position[pending[hit]]]
            pending = pending[~hit]
            position[pending] += 1
        return rows


class Store:
    """The rows of some shards, in one order over all of them.

    Args:
        path: Their folder or file, for messages.
        manifest: The encoder and the format.
        shards: The shards, in the order of their rows.
        index: Finds the rows of keys; by default it is made of the keys of the shards, in memory, when it is needed.
    """

    # What the class is for; None is for anything.
    KIND: ClassVar[str | None] = None

    def __init__(
        self, path: str | Path, manifest: StoreManifest, shards: Sequence[ShardFile], index: KeyIndex | None = None
    ) -> None:
        self.path, self.manifest, self.shards = Path(path), manifest, list(shards)
        self._own_index = index
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self._bits: list[np.ndarray | None] = [None] * len(self.shards)
        self._dtype: torch.dtype = getattr(torch, manifest.dtype)
        self._exponent = EXPONENTS[manifest.dtype]

    @classmethod
    def open(cls: type[StoreT], path: str | Path, *, verify: bool = True) -> StoreT:
        """Open the store of a local folder, or the shards that lie beside those of a data set in it, at any depth.

        Args:
            path: The folder.
            verify: Compare the files with their checksums, each when it is opened on this machine for the first time
                since it has changed; see [`verify_store`](llm2clip.store.verify.verify_store).

        Raises:
            FileNotFoundError: There is no store.
            StoreIncompleteError: It was not built to the end.
            StoreMismatchError: Its shards were made by different encoders.
            StoreDamagedError: A file is missing or damaged.
        """
        folder = Path(path)
        opened = cls._of_index(folder) if (folder / INDEX).is_file() else cls._of_shards(folder)
        if cls.KIND not in (None, opened.manifest.kind):
            wanted, actual = KINDS[str(cls.KIND)].name, opened.manifest.about.name
            raise StoreMismatchError(f"{folder} is of another kind: {actual}, not {wanted}.")
        if verify:
            opened.require_unchanged()
        return opened

    @classmethod
    def _of_index(cls: type[StoreT], folder: Path) -> StoreT:
        manifest = StoreManifest.read(folder / INDEX)
        file = ShardFile.of(rows_path(folder / INDEX), manifest)
        file.require_unchanged()
        shards = [
            ShardFile(folder / name, rows, size, checksum, manifest.about)
            for name, (rows, size, checksum) in manifest.shards.items()
        ]
        for shard in shards:
            shard.require_size()
        return cls(folder, manifest, shards, KeyIndex(*(file.open(name).numpy() for name in COLUMNS)))

    @classmethod
    def _of_shards(cls: type[StoreT], folder: Path) -> StoreT:
        paths = sorted(folder.rglob(SIDECAR_MANIFESTS))
        if not paths:
            raise _no_store(folder)
        manifests = [StoreManifest.read(path) for path in paths]
        for path, manifest in zip(paths, manifests, strict=True):
            if manifests[0].difference(manifest) is not None:
                raise StoreMismatchError(f"{paths[0]} and {path} are of different encoders; reuse those of one.")
        shards = [ShardFile.of(rows_path(path), manifest) for path, manifest in zip(paths, manifests, strict=True)]

        def write(path: Path) -> None:
            path.write_bytes(save(index_of(shards).columns()))

        identity = {"version": VERSION, "shards": [manifest.checksum for manifest in manifests]}
        path = shared_file("store-keys", identity, write)
        entry = ShardFile(path, sum(shard.rows for shard in shards), path.stat().st_size, "", manifests[0].about)
        return cls(folder, manifests[0], shards, KeyIndex(*(entry.open(name).numpy() for name in COLUMNS)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself: their content is not sent.
        return _open_again, (type(self), self.path, self.manifest, self.shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.manifest.width

    @property
    def _index(self) -> KeyIndex:
        if self._own_index is None:
            self._own_index = index_of(self.shards)
        return self._own_index

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the numbers of the rows with the given keys, (n,) int64; -1 for an unknown key."""
        return self._index.find(keys)

    def read(self, rows: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """Return rows by their numbers, (n, width); by default in the stored dtype.

        Raises:
            KeyError: A number is -1, that of a key which is not there.
            StoreDamagedError: A row is not finite.
        """
        if len(rows) and rows.min() < 0:
            raise KeyError(f"{int((rows < 0).sum())} of {len(rows)} keys have no row in the store {self.path}.")
        # As integers, because numpy has no bfloat16; numpy copies single rows faster than torch.
        if len(self.shards) == 1:
            bits = self._shard(0)[rows]
        else:
            bits = torch.empty((len(rows), self.width), dtype=INTEGERS[self._dtype.itemsize]).numpy()
            numbers = np.searchsorted(self._starts, rows, side="right") - 1
            for number in np.unique(numbers):
                positions = np.flatnonzero(numbers == number)
                bits[positions] = self._shard(int(number))[rows[positions] - self._starts[number]]
        result = torch.from_numpy(bits).view(self._dtype)
        if bits.size and (bits & self._exponent).max() == self._exponent:
            self._refuse_not_finite(result, rows)
        return result if dtype is None else result.to(dtype)

    def require_unchanged(self, rank: int = 0, world_size: int = 1) -> None:
        """Check that the shards are the files that were written; processes share them. See [`Store.open`].

        Raises:
            StoreDamagedError: One is missing or has changed.
        """
        for shard in self.shards[rank::world_size]:
            shard.require_unchanged()

    def map(self) -> None:
        """Map all shards into memory, and read their keys, now instead of when a row is read."""
        assert len(self._index) == len(self)
        for number in range(len(self.shards)):
            self._shard(number)

    def _shard(self, number: int) -> np.ndarray:
        bits = self._bits[number]
        if bits is None:
            bits = self.shards[number].open().view(INTEGERS[self._dtype.itemsize]).numpy()
            self._bits[number] = bits
        return bits

    def _refuse_not_finite(self, values: Tensor, rows: np.ndarray) -> None:
        """Raise an error that names the shard of the first of `rows` whose values are not finite."""
        bad = (~finite_rows(values)).nonzero()
        if len(bad):
            row = int(rows[int(bad[0])])
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            shard = self.shards[number]
            raise StoreDamagedError(
                f"Row {row - self._starts[number]} of the shard {shard.name} is not finite; delete the file and "
                f"{shard.about.remedy}, which only computes what is missing."
            )


def caption_keys(captions: Iterable[str]) -> np.ndarray:
    """Compute the keys of captions, (captions, 2) int64: the 128-bit BLAKE2b hash of each exact text."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in captions)
    return np.frombuffer(digests, dtype="<i8").reshape(-1, 2).astype(np.int64, copy=False)


class EmbeddingCache(Store):
    """Stored embeddings of captions, opened for reading by [`EmbeddingCache.open`]."""

    KIND = "captions"

    def contains(self, captions: Sequence[str]) -> np.ndarray:
        """Tell which captions have an embedding, (n,) bool."""
        return self.find(caption_keys(captions)) >= 0

    def rows(self, captions: Sequence[str]) -> np.ndarray:
        """Return the numbers of the rows of captions, found by their exact text, (n,) int64.

        Raises:
            MissingCaptionError: A caption has no embedding.
        """
        rows = self.find(caption_keys(captions))
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            shown = ", ".join(repr(captions[i][:80]) for i in missing[:3])
            raise MissingCaptionError(
                f"The embedding cache {self.path} ({len(self)} captions) lacks {len(missing)} of {len(captions)} "
                f"captions, such as {shown}. Run `llm2clip embed` on the source of these captions."
            )
        return rows

    def lookup(self, captions: Sequence[str], dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Return the embeddings of captions, found by their exact text.

        Args:
            captions: n captions, which may repeat.
            dtype: Dtype of the result; None keeps the stored dtype, which is fastest.

        Returns:
            (n, width).

        Raises:
            MissingCaptionError: A caption has no embedding.
            StoreDamagedError: A row is not finite.
        """
        return self.read(self.rows(captions), dtype)


def index_of(shards: Sequence[ShardFile]) -> KeyIndex:
    """Return the index of the keys of shards, in memory."""
    return KeyIndex.of(np.concatenate([np.empty((0, 2), np.int64), *(shard.keys() for shard in shards)]))


def _open_again(kind: type[StoreT], path: Path, manifest: StoreManifest, shards: Sequence[ShardFile]) -> StoreT:
    """Open a store as it was, also if another run has added rows to it or is doing so."""
    with suppress(StoreError, OSError):
        opened = kind.open(path, verify=False)
        if opened.manifest == manifest:
            return opened
    return kind(path, manifest, shards)


def stored_manifest(folder: str | Path) -> StoreManifest:
    """Return a manifest of the rows in a folder or below a URL: of its index, or of any shard beside another.

    Raises:
        FileNotFoundError: There are none.
        StoreError: The manifest is damaged or of another version.
    """
    root = open_path(folder)
    sidecars: Iterator[AnyPath] = iter(root.rglob(SIDECAR_MANIFESTS))
    path = root / INDEX if (root / INDEX).is_file() else next(sidecars, None)
    if path is None:
        raise _no_store(root)
    return StoreManifest.read(path)


def _no_store(folder: AnyPath) -> Exception:
    """Return the error that there is no store in a folder, or one that was not built to the end."""
    if next(iter(folder.glob(f"shard-*{ROWS_SUFFIX}")), None) is not None:
        return StoreIncompleteError(
            f"The store {folder} is incomplete: its build was interrupted. Run the command that builds it again, for "
            "captions `llm2clip embed`; it continues where it stopped."
        )
    return FileNotFoundError(f"{folder} is not an embedding cache (no {INDEX}); run `llm2clip embed` to make one.")


def has_sidecars(folder: str | Path) -> bool:
    """Tell whether a folder contains shards that lie beside others, at any depth, and no index of its own."""
    root = open_path(folder)
    return not (root / INDEX).is_file() and next(iter(root.rglob(SIDECAR_MANIFESTS)), None) is not None
