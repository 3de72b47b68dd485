"""The files of an embedding cache: 16-bit caption embeddings in shards, and a manifest.

A cache is a folder with `manifest.json` and `shard-00000.safetensors`, ... Each shard contains `embeddings`
(n, hidden) in float16 or bfloat16 and `keys` (n, 2) int64, the 128-bit BLAKE2b hash of each caption's exact text
(UTF-8, little-endian halves). The texts themselves are not stored.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import transformers

FORMAT = "llm2clip-embedding-cache"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
CacheDtype = Literal["float16", "bfloat16"]
# How captions become embeddings: a cache is only continued by a build that agrees in all of these.
IDENTITY = (
    "fingerprint",
    "hidden_size",
    "pooling",
    "prompt_prefix",
    "prompt_suffix",
    "max_length",
    "text_model_dtype",
    "dtype",
    "normalize",
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
        fingerprint: Identity of the text encoder.
        text_model_name: Its name, for messages.
        hidden_size: Width of an embedding.
        pooling, prompt_prefix, prompt_suffix, max_length: How the encoder reads a caption.
        text_model_dtype: The dtype that the text encoder computed in.
        dtype: The dtype of the stored embeddings.
        normalize: Whether embeddings have unit length.
        transformers_version: The version of transformers that computed them.
        shard_size: Rows per shard; the last shard of each build may be shorter.
        status: `building` or `complete`.
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

    def to_json(self) -> str:
        """Format the file."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "num_captions": self.num_captions}
        return json.dumps({**head, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

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
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


class ShardLayout(NamedTuple):
    """Where the tensors of a shard are within its file, from its safetensors header.

    Attributes:
        offset: Start of the embeddings, in bytes.
        shape: (rows, hidden).
        dtype: Dtype of the embeddings.
        keys_offset: Start of the keys, in bytes.
        metadata: The text fields of the header.
    """

    offset: int
    shape: tuple[int, int]
    dtype: torch.dtype
    keys_offset: int
    metadata: dict[str, str]


def read_layout(path: Path, rows: int, hidden_size: int) -> ShardLayout:
    """Read and check the header of a shard.

    The header is parsed here, not by the safetensors library: a truncated file is reported with its sizes, and the
    embeddings can be memory-mapped without an open file for each of a cache's thousands of shards.

    Args:
        path: The shard.
        rows: Expected rows.
        hidden_size: Expected width.

    Raises:
        CacheDamagedError: The file is missing, truncated or not such a shard.
    """
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
            f"The shard {path} contains embeddings {layout.shape} and keys {keys_shape} instead of "
            f"{(rows, hidden_size)} and {(rows, 2)}; {advice}."
        )
    return layout


def read_keys(path: Path, layout: ShardLayout) -> np.ndarray:
    """Read the keys of a shard, (n, 2) int64."""
    rows = layout.shape[0]
    return np.fromfile(path, dtype="<i8", count=rows * 2, offset=layout.keys_offset).reshape(rows, 2)
