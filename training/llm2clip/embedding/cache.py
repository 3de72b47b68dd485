"""Reading the embedding cache: 16-bit caption embeddings in memory-mapped shards, found by the caption's text.

A cache is a folder with `manifest.json` and `shard-00000.safetensors`, ... Each shard holds `embeddings` (n, hidden)
in float16 or bfloat16 and `keys` (n, 2) int64, the 128-bit BLAKE2b hash of each caption's exact text (UTF-8,
little-endian halves). The texts themselves are not stored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from llm2clip.data.records import caption_keys

FORMAT = "llm2clip-embedding-cache"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
SCAN_ROWS = 4096


class CacheError(ValueError):
    """An embedding cache that cannot be used."""


class CacheMismatchError(CacheError):
    """A cache that another text encoder made, or that holds other captions."""


class CacheIncompleteError(CacheError):
    """A cache whose build has not ended."""


class CacheDamagedError(CacheError):
    """A cache with a missing, truncated or corrupt file."""


class MissingCaptionError(KeyError):
    """Captions without an embedding in the cache."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show its message in quotes


@dataclass
class CacheManifest:
    """What `manifest.json` says.

    Attributes:
        fingerprint: Identity of the text encoder.
        text_model_name: Its name, for messages.
        hidden_size: Width of an embedding.
        pooling, prompt_prefix, prompt_suffix, max_length: How captions were encoded.
        text_model_dtype: The dtype that the text encoder computed in.
        dtype: That of the embeddings here: `float16` or `bfloat16`.
        normalize: Whether embeddings have unit length.
        transformers_version: The version that computed them.
        shard_size: Rows per shard; the last shard of each build may be shorter.
        status: `building` or `complete`.
        plan_digest: Hash over all captions' keys in order.
        shards: Rows of each shard.
        num_truncated: Captions that were longer than `max_length`.
    """

    fingerprint: str
    text_model_name: str
    hidden_size: int
    pooling: str
    prompt_prefix: str
    prompt_suffix: str
    max_length: int
    text_model_dtype: str
    dtype: str
    normalize: bool
    transformers_version: str
    shard_size: int
    status: str = "building"
    plan_digest: str = ""
    shards: list[int] = field(default_factory=list)
    num_truncated: int = 0

    @property
    def num_captions(self) -> int:
        """Number of captions in all shards."""
        return sum(self.shards)

    def to_json(self) -> str:
        """The file's content."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "num_captions": self.num_captions}
        return json.dumps({**head, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> CacheManifest:
        """Read a cache's manifest.

        Raises:
            FileNotFoundError: If there is none.
            CacheDamagedError: If it cannot be read or lacks a field.
            CacheError: If it is of another format or version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} is not an embedding cache (no {MANIFEST}); make one with `llm2clip embed`."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CacheDamagedError(
                f"{path} is not valid JSON ({error}); delete the folder and embed again."
            ) from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise CacheError(f"{path} is not the manifest of an embedding cache (no format {FORMAT!r}).")
        if values.get("format_version") != FORMAT_VERSION:
            raise CacheError(
                f"{folder} has format version {values.get('format_version')}, but this release reads version "
                f"{FORMAT_VERSION}; use the release that made it, or embed again."
            )
        names = [entry.name for entry in fields(cls)]
        missing = [name for name in names if name not in values]
        if missing:
            raise CacheDamagedError(f"{path} lacks {', '.join(missing)}; delete the folder and embed again.")
        return cls(**{name: values[name] for name in names})


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


class ShardLayout(NamedTuple):
    """Where a shard's tensors are within its file, as its safetensors header says.

    Attributes:
        offset: Start of the embeddings, in bytes.
        shape: (rows, hidden).
        dtype: Of the embeddings.
        keys_offset: Start of the keys, in bytes.
        metadata: The header's free text fields.
    """

    offset: int
    shape: tuple[int, int]
    dtype: torch.dtype
    keys_offset: int
    metadata: dict[str, str]


def read_layout(path: Path, rows: int, hidden_size: int) -> ShardLayout:
    """Read and check a shard's header.

    The header is parsed here, not by the safetensors library, so that a truncated file is reported with its sizes
    and the embeddings can be mapped without holding a file open: a cache has thousands of shards.

    Args:
        path: The shard.
        rows: Expected rows.
        hidden_size: Expected width.

    Raises:
        CacheDamagedError: If the file is missing, truncated or not such a shard.
    """
    advice = "delete it and run `llm2clip embed` again, which makes only what is missing"
    if not path.is_file():
        raise CacheDamagedError(f"The shard {path} is missing; run `llm2clip embed` again to make it.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        embeddings, keys = header["embeddings"], header["keys"]
        start = 8 + length
        end = start + max(embeddings["data_offsets"][1], keys["data_offsets"][1])
        layout = ShardLayout(
            offset=start + embeddings["data_offsets"][0],
            shape=tuple(embeddings["shape"]),
            dtype=DTYPES[embeddings["dtype"]],
            keys_offset=start + keys["data_offsets"][0],
            metadata=header.get("__metadata__", {}),
        )
        keys_shape = tuple(keys["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise CacheDamagedError(f"The shard {path} ({size} bytes) has no valid header ({error}); {advice}.") from error
    if size != end:
        raise CacheDamagedError(f"The shard {path} is truncated: {size} bytes instead of {end}; {advice}.")
    if layout.shape != (rows, hidden_size) or keys_shape != (rows, 2):
        raise CacheDamagedError(
            f"The shard {path} holds embeddings {layout.shape} and keys {keys_shape} instead of "
            f"{(rows, hidden_size)} and {(rows, 2)}; {advice}."
        )
    return layout


def read_keys(path: Path, layout: ShardLayout) -> np.ndarray:
    """The keys of a shard, (n, 2) int64."""
    rows = layout.shape[0]
    return np.fromfile(path, dtype="<i8", count=rows * 2, offset=layout.keys_offset).reshape(rows, 2)


class KeyIndex:
    """Finds the row of a key among n keys: a sorted array, 20 bytes per key and no Python object.

    Args:
        keys: (n, 2) int64, all different.
    """

    def __init__(self, keys: np.ndarray) -> None:
        order = np.argsort(keys[:, 0], kind="stable")
        self._order = order.astype(np.uint32) if len(order) < 2**32 else order
        self._high = keys[order, 0]
        self._low = keys[order, 1]

    def __len__(self) -> int:
        return len(self._high)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key, (m,) int64; -1 where there is none."""
        rows = np.full(len(keys), -1, dtype=np.int64)
        position = np.searchsorted(self._high, keys[:, 0])
        pending = np.arange(len(keys))
        while len(pending):  # more than one round only where first halves collide
            pending = pending[position[pending] < len(self)]
            pending = pending[self._high[position[pending]] == keys[pending, 0]]
            hit = self._low[position[pending]] == keys[pending, 1]
            rows[pending[hit]] = self._order[position[pending[hit]]]
            pending = pending[~hit]
            position[pending] += 1
        return rows


class EmbeddingCache:
    """A complete embedding cache, opened for reading (see `EmbeddingCache.open`)."""

    def __init__(self, path: Path, manifest: CacheManifest, shards: list[torch.Tensor], index: KeyIndex) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = shards
        self._bits = [shard.view(torch.int16).numpy() for shard in shards]
        self._index = index
        self._starts = np.cumsum([0, *manifest.shards])

    @classmethod
    def open(cls, path: str | Path, fingerprint: str | None = None, verify: bool = True) -> EmbeddingCache:
        """Open a cache.

        Args:
            path: The folder.
            fingerprint: The text encoder in use; the cache must be its work. None accepts any.
            verify: Read every embedding once, see `check_finite`. Rows are checked as they are looked up in any case,
                so that large caches can be opened without.

        Raises:
            FileNotFoundError: If there is no cache.
            CacheMismatchError: If another encoder made it.
            CacheIncompleteError: If its build has not ended.
            CacheDamagedError: If a shard is missing, truncated or holds a non-finite row.
            CacheError: If it has another format version.
        """
        folder = Path(path)
        manifest = CacheManifest.read(folder)
        if fingerprint is not None and manifest.fingerprint != fingerprint:
            raise CacheMismatchError(
                f"The embedding cache {folder} was made by {manifest.text_model_name} with fingerprint "
                f"{manifest.fingerprint}, but the text encoder in use has fingerprint {fingerprint}. Use that "
                "encoder, or embed the captions with this one into another folder (`llm2clip embed`)."
            )
        if manifest.status != "complete":
            raise CacheIncompleteError(
                f"The embedding cache {folder} is incomplete: its build of {manifest.num_captions} captions has not "
                "ended. Run the same `llm2clip embed` again; it goes on where it stopped."
            )
        shards, keys = [], []
        for number, rows in enumerate(manifest.shards):
            file = folder / shard_name(number)
            layout = read_layout(file, rows, manifest.hidden_size)
            shards.append(_map_embeddings(file, layout))
            keys.append(read_keys(file, layout))
        cache = cls(folder, manifest, shards, KeyIndex(np.concatenate(keys) if keys else np.empty((0, 2), np.int64)))
        if verify:
            cache.check_finite()
        return cache

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself instead of receiving their contents.
        return type(self).open, (self.path, self.manifest.fingerprint, False)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def hidden_size(self) -> int:
        """Width of an embedding."""
        return self.manifest.hidden_size

    def contains(self, captions: Sequence[str]) -> np.ndarray:
        """Which captions have an embedding, (n,) bool."""
        return self._index.find(caption_keys(captions)) >= 0

    def lookup(self, captions: Sequence[str], dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
        """The embeddings of captions, by exact text.

        Args:
            captions: n captions; they may repeat.
            dtype: Of the result; None keeps the 16 bits of the cache, which is the fastest.

        Returns:
            (n, hidden).

        Raises:
            MissingCaptionError: If any caption has no embedding.
            CacheDamagedError: If a row is not finite.
        """
        rows = self._index.find(caption_keys(captions))
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            shown = ", ".join(repr(captions[i][:80]) for i in missing[:3])
            raise MissingCaptionError(
                f"The embedding cache {self.path} ({len(self)} captions) lacks {len(missing)} of {len(captions)} "
                f"captions, the first being {shown}. Run `llm2clip embed` on the source that they come from."
            )
        # As integers, since numpy has no bfloat16; it copies single rows faster than torch.
        bits = np.empty((len(rows), self.hidden_size), dtype=np.int16)
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            bits[places] = self._bits[number][rows[places] - self._starts[number]]
        result = torch.from_numpy(bits).view(getattr(torch, self.manifest.dtype))
        # One number that is not finite makes the sum so; which one is only looked for then.
        if not torch.isfinite(result.sum(dtype=torch.float32)):
            bad = (~torch.isfinite(result).all(dim=1)).nonzero()
            if len(bad):
                row = int(rows[int(bad[0])])
                self._raise_not_finite(int(np.searchsorted(self._starts, row, side="right")) - 1, row)
        return result if dtype is None else result.to(dtype)

    def check_finite(self, rank: int = 0, world_size: int = 1) -> None:
        """Read every embedding once and check that it is finite; several processes share the shards.

        Args:
            rank: This process.
            world_size: Number of processes.

        Raises:
            CacheDamagedError: If a row is not finite.
        """
        for number in range(rank, len(self._shards), world_size):
            shard = self._shards[number]
            for start in range(0, len(shard), SCAN_ROWS):
                bad = (~torch.isfinite(shard[start : start + SCAN_ROWS]).all(dim=1)).nonzero()
                if len(bad):
                    self._raise_not_finite(number, int(self._starts[number]) + start + int(bad[0]))

    def _raise_not_finite(self, number: int, row: int) -> None:
        raise CacheDamagedError(
            f"Row {row - int(self._starts[number])} of the shard {self.path / shard_name(number)} is not finite; "
            "delete the file and run `llm2clip embed` again, which makes only what is missing."
        )


def _map_embeddings(path: Path, layout: ShardLayout) -> torch.Tensor:
    rows, width = layout.shape
    if rows * width == 0:
        return torch.empty(layout.shape, dtype=layout.dtype)
    nbytes = layout.offset + rows * width * layout.dtype.itemsize
    content = torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8)
    return content[layout.offset :].view(layout.dtype).view(rows, width)
