"""The files of a store: `NAME.safetensors` with rows and keys, and then `NAME.manifest`.

The tensor `rows` is (n, width), `keys` is (n, 2) int64: the 128-bit BLAKE2b hash (little-endian halves) of what each
row was computed from, such as a caption's exact text in UTF-8 or an image's encoded bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llm2clip.files.atomic import atomic_path, sha256
from llm2clip.files.remote_path import AnyPath, local_file
from llm2clip.files.shared_files import stored_sha256
from llm2clip.store.manifest import Kind, StoreDamagedError, StoreManifest, manifest_path

# What safetensors calls the dtypes of rows.
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_shard(path: AnyPath, tensors: Mapping[str, Tensor], manifest: StoreManifest) -> StoreManifest:
    """Write the file of a shard, and then its manifest, without which it counts as missing.

    Args:
        path: `NAME.safetensors`, local or remote.
        tensors: `rows` and `keys`.
        manifest: What is written beside it, except for what the file itself states.
    """
    rows = tensors["rows"]
    width = rows.shape[1] if rows.ndim == 2 else manifest.width
    # Not by `save_file`, whose own temporary file would stay if it is killed.
    return _write(path, [save(dict(tensors))], replace(manifest, rows=len(rows), width=width))


def write_rows(path: AnyPath, keys: np.ndarray, rows: Iterable[Tensor], manifest: StoreManifest) -> StoreManifest:
    """Write a shard as [`write_shard`] does, of rows that are computed meanwhile and not held in memory.

    Args:
        path: `NAME.safetensors`, local or remote.
        keys: (n, 2) int64.
        rows: The n rows in the dtype of the manifest, some at a time: (m, width).
        manifest: See [`write_shard`]; its `counts` may be counted while the rows are computed.
    """
    size = len(keys) * manifest.width * getattr(torch, manifest.dtype).itemsize
    described: dict[str, Any] = {
        "keys": {"dtype": "I64", "shape": [len(keys), 2], "data_offsets": [0, keys.nbytes]},
        "rows": {
            "dtype": SAFETENSORS_NAMES[manifest.dtype],
            "shape": [len(keys), manifest.width],
            "data_offsets": [keys.nbytes, keys.nbytes + size],
        },
    }
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    start: list[Any] = [len(header).to_bytes(8, "little"), header, keys_tensor(keys).numpy().tobytes()]
    parts = itertools.chain(start, (part.contiguous().view(torch.uint8).numpy() for part in rows))
    return _write(path, parts, replace(manifest, rows=len(keys)))


def _write(path: AnyPath, parts: Iterable[Any], manifest: StoreManifest) -> StoreManifest:
    """Write the parts of a file, one after another, and then its manifest."""
    digest, written = hashlib.sha256(), 0
    with atomic_path(path) if isinstance(path, Path) else local_file(path) as temporary:
        with temporary.open("wb") as file:
            for part in parts:
                written += file.write(part)
                digest.update(part)
        manifest_path(path).unlink(missing_ok=True)
    manifest = replace(manifest, bytes=written, checksum=digest.hexdigest())
    manifest.write(manifest_path(path))
    return manifest


class ShardFile(NamedTuple):
    """A local file of a store, with what its manifest says about it.

    Attributes:
        path: `NAME.safetensors`.
        rows, bytes, checksum: Those of the manifest.
        about: The words of messages.
        origin: Of a copy, the file that it is of, for messages.
    """

    path: Path
    rows: int
    bytes: int
    checksum: str
    about: Kind
    origin: AnyPath | None = None

    @classmethod
    def of(cls, path: Path, manifest: StoreManifest, origin: AnyPath | None = None) -> ShardFile:
        """Return the file that a manifest describes."""
        return cls(path, manifest.rows, manifest.bytes, manifest.checksum, manifest.about, origin)

    @property
    def name(self) -> str:
        """What the file is called in messages."""
        return str(self.path if self.origin is None else self.origin)

    def require_size(self) -> None:
        """Raise a `StoreDamagedError` if the file is missing or has another size."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise StoreDamagedError(f"The shard {self.name} is missing; {self.about.remedy}.") from None
        if size != self.bytes:
            what = "is truncated" if size < self.bytes else "has changed"
            raise StoreDamagedError(
                f"The shard {self.name} {what}: {size} bytes instead of {self.bytes}; {self._fix}."
            )

    def require_unchanged(self, always: bool = False) -> None:
        """Raise a `StoreDamagedError` if the file is not the one that was written.

        Args:
            always: Read the file, also if it has not changed since it was read on this machine.
        """
        self.require_size()
        if (sha256 if always else stored_sha256)(self.path) != self.checksum:
            raise StoreDamagedError(
                f"The shard {self.name} has changed since it was written: its checksum is not that of the manifest; "
                f"{self._fix}."
            )

    def open(self, name: str = "rows") -> Tensor:
        """Map a tensor of the file into memory, `rows` or `keys`; no file stays open.

        Raises:
            StoreDamagedError: The file is missing, truncated, or has no such tensor.
        """
        self.require_size()
        try:
            with safe_open(self.path, "pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise StoreDamagedError(f"The shard {self.name} cannot be read ({error}); {self._fix}.") from error

    def keys(self) -> np.ndarray:
        """Return the keys, (rows, 2) int64."""
        return self.open("keys").numpy()

    @property
    def _fix(self) -> str:
        return f"delete it and {self.about.remedy}, which only computes what is missing"


def keys_tensor(keys: np.ndarray) -> Tensor:
    """Return keys as they are stored."""
    # A copy, since torch warns of what is read-only.
    return torch.from_numpy(np.array(keys, dtype=np.int64, order="C"))
