"""The files of a cache of embeddings: rows in shards, in 16 bits unless they have to be exact, and a manifest.

A cache is a folder with `manifest.json` and `shard-00000.safetensors`, ... Each shard contains `embeddings`
(n, hidden) in float16, bfloat16 or float32, and `keys` (n, 2) int64, the 128-bit BLAKE2b hash (little-endian halves)
of what each row was computed from: a caption's exact text in UTF-8, or an image's encoded bytes. Neither is stored
itself.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import transformers

from llm2clip.utils.files import read_json, sha256, write_json
from llm2clip.utils.manifests import is_intact, sealed
from llm2clip.utils.settings import build_config

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
CacheDtype = Literal["float16", "bfloat16", "float32"]
ManifestT = TypeVar("ManifestT", bound="StoreManifest")
# Bytes of half a key.
KEY_SIZE = 8


class CacheError(ValueError):
    """A cache cannot be used."""


class CacheMismatchError(CacheError):
    """A cache was made by another encoder, or for other captions or images."""


class CacheIncompleteError(CacheError):
    """A cache was not built to the end."""


class CacheDamagedError(CacheError):
    """A file of a cache is missing, truncated or corrupt."""


class MissingCaptionError(KeyError):
    """Captions have no embedding in the cache."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print its message in quotes


@dataclass(kw_only=True)
class StoreManifest:
    """The content of `manifest.json`, as far as it is common to all caches.

    Attributes:
        fingerprint: Identity of the encoder.
        hidden_size: Width of a row.
        dtype: The dtype that the rows are stored in.
        transformers_version: The version of transformers that computed them.
        shard_size: Rows per shard; the last shard of each build may be shorter.
        plan_digest: Hash over all keys, in order.
        shards: Rows of each shard.
        checksums: SHA-256 of each shard by its file name, once the cache is complete.
    """

    FORMAT: ClassVar[str]
    # For messages: what the cache is, what a row belongs to, and how missing rows are computed.
    NAME: ClassVar[str]
    UNIT: ClassVar[str]
    REMEDY: ClassVar[str]
    # What a row depends on: a cache is only continued by a build that agrees in all of these.
    IDENTITY: ClassVar[tuple[str, ...]]

    fingerprint: str
    hidden_size: int
    dtype: CacheDtype = "float16"
    transformers_version: str = transformers.__version__
    shard_size: int = 8192
    status: Literal["building", "complete"] = "building"
    plan_digest: str = ""
    shards: list[int] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)

    @property
    def encoder(self) -> str:
        """Name of the encoder in messages."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Return the fields that a row depends on."""
        return {name: getattr(self, name) for name in self.IDENTITY}

    @property
    def num_rows(self) -> int:
        """Number of rows in all shards."""
        return sum(self.shards)

    def finish(self, metadata: list[dict[str, str]]) -> None:
        """Take what the finished cache records from the metadata of its shards."""

    def write(self, folder: Path) -> None:
        """Write the manifest of a cache."""
        head = {"format": self.FORMAT, "format_version": FORMAT_VERSION, f"num_{self.UNIT}s": self.num_rows}
        write_json(folder / MANIFEST, sealed({**head, **asdict(self)}))

    @classmethod
    def read(cls: type[ManifestT], folder: Path) -> ManifestT:
        """Read the manifest of a cache.

        Raises:
            FileNotFoundError: There is no manifest.
            CacheDamagedError: It cannot be read, lacks a field, or has changed.
            CacheError: It has another format or version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not an {cls.NAME} (no {MANIFEST}); {cls.REMEDY} to make one.")
        try:
            values = read_json(path)
        except ValueError as error:
            raise CacheDamagedError(f"{str(error).rstrip('.')}; delete the folder and {cls.REMEDY}.") from error
        if values.get("format") != cls.FORMAT:
            raise CacheError(f"{path} is not the manifest of an {cls.NAME} (no format {cls.FORMAT!r}).")
        if values.get("format_version") != FORMAT_VERSION:
            raise CacheError(
                f"{folder} has format version {values.get('format_version')}, but this release reads version "
                f"{FORMAT_VERSION}; use the release that made it, or {cls.REMEDY} into another folder."
            )
        names = {entry.name for entry in fields(cls)}
        if missing := names - set(values):
            message = f"{path} lacks {', '.join(sorted(missing))}; delete the folder and {cls.REMEDY}."
            raise CacheDamagedError(message)
        try:
            manifest = build_config(cls, {name: values[name] for name in names}, str(path))
        except ValueError as error:
            raise CacheDamagedError(f"{str(error).rstrip('.')}; delete the folder and {cls.REMEDY}.") from error
        if not is_intact(values):
            message = f"{path} has changed since it was written; delete the folder and {cls.REMEDY}."
            raise CacheDamagedError(message)
        return manifest


@dataclass(kw_only=True)
class CacheManifest(StoreManifest):
    """The manifest of an [`EmbeddingCache`].

    Attributes:
        fingerprint, text_model_name: Identity of the text encoder, and its name in messages.
        tokenizer_fingerprint: Identity of its tokenizer; None if it is unknown, and any is accepted.
        pooling, prompt_prefix, prompt_suffix, max_length: How the encoder reads a caption; an instruction is
            part of the prefix.
        text_model_dtype: The dtype that the text encoder computed in.
        normalize: Whether embeddings have unit length.
        num_truncated: Captions that were longer than `max_length`.
        kwargs: See [`StoreManifest`].
    """

    FORMAT = "llm2clip-embedding-cache"
    NAME = "embedding cache"
    UNIT = "caption"
    REMEDY = "run `llm2clip embed` again"
    IDENTITY = (
        "fingerprint",
        "tokenizer_fingerprint",
        "hidden_size",
        "pooling",
        "prompt_prefix",
        "prompt_suffix",
        "max_length",
        "text_model_dtype",
        "dtype",
        "normalize",
    )

    text_model_name: str
    pooling: str
    prompt_prefix: str
    prompt_suffix: str
    max_length: int
    tokenizer_fingerprint: str | None = None
    text_model_dtype: str = "float32"
    normalize: bool = False
    num_truncated: int = 0

    @property
    def encoder(self) -> str:
        return self.text_model_name

    @property
    def num_captions(self) -> int:
        """Number of captions in all shards."""
        return self.num_rows

    def finish(self, metadata: list[dict[str, str]]) -> None:
        self.num_truncated = sum(int(entries["num_truncated"]) for entries in metadata)
        if self.num_truncated:
            counts = (self.num_truncated, self.num_captions, self.max_length)
            logger.warning("%d of %d captions were cut at %d tokens.", *counts)


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


class Shard(NamedTuple):
    """A file of a cache: shape and dtype of its embeddings, where they and the keys start in bytes, its metadata."""

    path: Path
    shape: tuple[int, int]
    dtype: torch.dtype
    offset: int
    keys_offset: int
    metadata: dict[str, str]

    def embeddings(self) -> torch.Tensor:
        """Map the embeddings, (rows, hidden), into memory."""
        nbytes = self.offset + math.prod(self.shape) * self.dtype.itemsize
        content = torch.from_file(str(self.path), shared=False, size=nbytes, dtype=torch.uint8)
        return content[self.offset :].view(self.dtype).view(self.shape)

    def keys(self) -> np.ndarray:
        """Read the keys, (rows, 2) int64."""
        rows = self.shape[0]
        return np.fromfile(self.path, dtype="<i8", count=rows * 2, offset=self.keys_offset).reshape(rows, 2)


def checksum_path(folder: Path, number: int) -> Path:
    """Return the path of the file with the checksum of a shard, as long as the manifest does not have it."""
    return folder / f".shard-{number:05d}.sha256"


def recorded_checksum(folder: Path, manifest: StoreManifest, number: int) -> str | None:
    """Return the SHA-256 that a shard had when it was written; None if a kill kept it from being recorded."""
    try:
        return checksum_path(folder, number).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return manifest.checksums.get(shard_name(number))


def has_changed(folder: Path, manifest: StoreManifest, number: int) -> bool:
    """Read a shard and tell whether it is another file than the one that was written."""
    expected = recorded_checksum(folder, manifest, number)
    if expected is None:
        return manifest.status == "complete"
    return sha256(folder / shard_name(number)) != expected


def require_unchanged(folder: Path, manifest: StoreManifest, number: int) -> None:
    """Raise a `CacheDamagedError` if a shard is another file than the one that was written."""
    if has_changed(folder, manifest, number):
        raise CacheDamagedError(
            f"The shard {folder / shard_name(number)} has changed since it was written: its checksum is not that of "
            f"the manifest; {manifest.REMEDY}, which only computes that shard again."
        )


def open_shard(folder: Path, manifest: StoreManifest, number: int) -> Shard:
    """Read and check the header of a shard of a cache; see [`read_shard`]."""
    advice = f"delete it and {manifest.REMEDY}, which only computes what is missing"
    return read_shard(folder / shard_name(number), manifest.shards[number], manifest.hidden_size, advice)


def read_shard(path: Path, rows: int, hidden_size: int, advice: str) -> Shard:
    """Read and check the header of a file of embeddings.

    The header is parsed here, not by the safetensors library: a truncated file is reported with its sizes, and the
    embeddings can be memory-mapped without an open file for each of a cache's thousands of shards.

    Args:
        rows, hidden_size: The shape that its manifest states.
        advice: For messages: how a damaged file is mended.

    Raises:
        CacheDamagedError: The file is missing, truncated or not of this shape.
    """
    if not path.is_file():
        raise CacheDamagedError(f"The shard {path} is missing; {advice.removeprefix('delete it and ')}.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        embeddings, keys = header["embeddings"], header["keys"]
        (offset, embeddings_end), (keys_offset, keys_end) = embeddings["data_offsets"], keys["data_offsets"]
        start, end = 8 + length, 8 + length + max(embeddings_end, keys_end)
        shape, keys_shape = tuple(embeddings["shape"]), tuple(keys["shape"])
        dtype, metadata = DTYPES[embeddings["dtype"]], header.get("__metadata__", {})
        sizes = math.prod(shape) * dtype.itemsize, math.prod(keys_shape) * KEY_SIZE
        if sizes != (embeddings_end - offset, keys_end - keys_offset):
            raise ValueError("its shapes do not fit its sizes")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheDamagedError(f"The shard {path} ({size} bytes) has no valid header ({error}); {advice}.") from error
    if size != end:
        raise CacheDamagedError(f"The shard {path} is truncated: {size} bytes instead of {end}; {advice}.")
    if shape != (rows, hidden_size) or keys_shape != (rows, 2):
        raise CacheDamagedError(
            f"The shard {path} contains embeddings {shape} and keys {keys_shape} instead of "
            f"{(rows, hidden_size)} and {(rows, 2)}; {advice}."
        )
    return Shard(path, shape, dtype, start + offset, start + keys_offset, metadata)
