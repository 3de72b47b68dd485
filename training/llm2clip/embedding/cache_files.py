"""The files of an embedding cache: 16-bit caption embeddings in shards, and a manifest.

A cache is a folder with `manifest.json` and `shard-00000.safetensors`, ... Each shard contains `embeddings`
(n, hidden) in float16 or bfloat16 and `keys` (n, 2) int64, the 128-bit BLAKE2b hash of each caption's exact text
(UTF-8, little-endian halves). The texts themselves are not stored.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import transformers

from llm2clip.utils.files import read_json, write_json

FORMAT = "llm2clip-embedding-cache"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
CacheDtype = Literal["float16", "bfloat16"]
# How captions become embeddings: a cache is only continued by a build that agrees in all of these.
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

TWO_RULES = (
    " The one without `2-` was recorded by an earlier release of llm2clip, so the two say nothing about each other."
)
ACCEPTED_EARLIER = (
    "was made by an earlier release. It fits by the rule of that release, which read 64 values of each weight and "
    "neither the decoder's settings nor the tokenizer; embed again into another folder to be sure."
)


class CacheError(ValueError):
    """An embedding cache cannot be used."""


class CacheMismatchError(CacheError):
    """A cache was made by another text encoder, or for other captions."""


class CacheIncompleteError(CacheError):
    """A cache was not built to the end."""


class CacheDamagedError(CacheError):
    """A file of a cache is missing, truncated or corrupt."""


class MissingCaptionError(KeyError):
    """Captions have no embedding in the cache."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print its message in quotes


@dataclass
class CacheManifest:
    """The content of `manifest.json`.

    Attributes:
        fingerprint, text_model_name: Identity of the text encoder, and its name in messages.
        tokenizer_fingerprint: Identity of its tokenizer; None in caches of earlier releases.
        hidden_size: Width of an embedding.
        pooling, prompt_prefix, prompt_suffix, max_length: How the encoder reads a caption; an instruction is
            part of the prefix.
        text_model_dtype, dtype: The dtypes that the text encoder computed in, and that the embeddings are stored in.
        normalize: Whether embeddings have unit length.
        transformers_version: The version of transformers that computed them.
        shard_size: Rows per shard; the last shard of each build may be shorter.
        plan_digest: Hash over the keys of all captions, in order.
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
    tokenizer_fingerprint: str | None = None
    text_model_dtype: str = "float32"
    dtype: CacheDtype = "float16"
    normalize: bool = False
    transformers_version: str = transformers.__version__
    shard_size: int = 8192
    status: Literal["building", "complete"] = "building"
    plan_digest: str = ""
    shards: list[int] = field(default_factory=list)
    num_truncated: int = 0

    @property
    def num_captions(self) -> int:
        """Number of captions in all shards."""
        return sum(self.shards)

    def write(self, folder: Path) -> None:
        """Write the manifest of a cache."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "num_captions": self.num_captions}
        write_json(folder / MANIFEST, {**head, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> CacheManifest:
        """Read the manifest of a cache.

        Raises:
            FileNotFoundError: There is no manifest.
            CacheDamagedError: It cannot be read, or lacks a field.
            CacheError: It has another format or version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not an embedding cache (no {MANIFEST}); `llm2clip embed` makes one.")
        try:
            values = read_json(path)
        except ValueError as error:
            raise CacheDamagedError(f"{str(error).rstrip('.')}; delete the folder and embed again.") from error
        if values.get("format") != FORMAT:
            raise CacheError(f"{path} is not the manifest of an embedding cache (no format {FORMAT!r}).")
        if values.get("format_version") != FORMAT_VERSION:
            raise CacheError(
                f"{folder} has format version {values.get('format_version')}, but this release reads version "
                f"{FORMAT_VERSION}; use the release that made it, or embed again."
            )
        names = {entry.name for entry in fields(cls)}
        if missing := names - set(values) - {"tokenizer_fingerprint"}:
            raise CacheDamagedError(f"{path} lacks {', '.join(sorted(missing))}; delete the folder and embed again.")
        return cls(**{name: values[name] for name in names & set(values)})


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


def open_shard(folder: Path, manifest: CacheManifest, number: int) -> Shard:
    """Read and check the header of a shard.

    The header is parsed here, not by the safetensors library: a truncated file is reported with its sizes, and the
    embeddings can be memory-mapped without an open file for each of a cache's thousands of shards.

    Raises:
        CacheDamagedError: The file is missing, truncated or not a shard of the size in the manifest.
    """
    path, rows, hidden_size = folder / shard_name(number), manifest.shards[number], manifest.hidden_size
    advice = "delete it and run `llm2clip embed` again, which only computes what is missing"
    if not path.is_file():
        raise CacheDamagedError(f"The shard {path} is missing; run `llm2clip embed` again to compute it.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        embeddings, keys = header["embeddings"], header["keys"]
        (offset, end), (keys_offset, keys_end) = embeddings["data_offsets"], keys["data_offsets"]
        start, end = 8 + length, 8 + length + max(end, keys_end)
        shape, keys_shape = tuple(embeddings["shape"]), tuple(keys["shape"])
        dtype, metadata = DTYPES[embeddings["dtype"]], header.get("__metadata__", {})
    except (ValueError, KeyError, TypeError) as error:
        raise CacheDamagedError(f"The shard {path} ({size} bytes) has no valid header ({error}); {advice}.") from error
    if size != end:
        raise CacheDamagedError(f"The shard {path} is truncated: {size} bytes instead of {end}; {advice}.")
    if shape != (rows, hidden_size) or keys_shape != (rows, 2):
        raise CacheDamagedError(
            f"The shard {path} contains embeddings {shape} and keys {keys_shape} instead of "
            f"{(rows, hidden_size)} and {(rows, 2)}; {advice}."
        )
    return Shard(path, shape, dtype, start + offset, start + keys_offset, metadata)
