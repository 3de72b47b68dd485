"""The files of a store: `NAME.safetensors` with rows and keys, and then `NAME.manifest`.

The tensor `rows` is (n, width), `keys` is (n, 2) int64: the 128-bit BLAKE2b hash (little-endian halves) of what each
row was computed from, such as a caption's exact text in UTF-8 or an image's encoded bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm2clip.files.atomic import atomic_path, leftovers, sha256
from llm2clip.files.locks import WAIT, lock_beside
from llm2clip.files.remote_path import AnyPath, local_file
from llm2clip.files.shared_files import stored_sha256
from llm2clip.models.embeddings import require_finite_rows
from llm2clip.store.manifest import ROWS_SUFFIX, Kind, StoreDamagedError, StoreManifest, manifest_path

logger = logging.getLogger(__name__)

# What safetensors calls the dtypes of rows.
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass
class ComputedRows:
    """Some rows of a shard.

    Attributes:
        rows: (n, width) of any dtype and device.
        counts, skipped: Those of [`StoreManifest`]; row numbers are those among these rows.
    """

    rows: Tensor
    counts: Mapping[str, int] = field(default_factory=dict)
    skipped: Sequence[tuple[int, str, str]] = ()


def write_shard(
    path: AnyPath,
    keys: np.ndarray,
    parts: Iterable[ComputedRows],
    manifest: StoreManifest,
    name: Callable[[int], str] = "row {}".format,
) -> StoreManifest:
    """Write a shard while its rows are computed, and then its manifest, without which it counts as missing.

    Args:
        path: `NAME.safetensors`, local or remote.
        keys: (n, 2) int64.
        parts: The n rows in their order, some at a time; no more than a part is in memory.
        manifest: What is written beside it, except for what the file itself states. Its counts are counted on.
        name: Describes a row in errors.

    Raises:
        NonFiniteError: A value is NaN or infinite.
        ValueError: A value exceeds the range of the stored dtype, or there is another number of rows.
    """
    counts, skipped, done, width = dict(manifest.counts), list[tuple[int, str, str]](), 0, manifest.width

    def content() -> Iterator[Any]:
        nonlocal done, width
        computed = iter(parts)
        first = next(computed, None)
        width = width if first is None else first.rows.shape[1]
        yield _header(keys, width, manifest.dtype)
        for part in itertools.chain([] if first is None else [first], computed):
            yield _stored(part.rows, manifest, name, done)
            skipped.extend((done + row, key, reason) for row, key, reason in part.skipped)
            for counted, count in part.counts.items():
                counts[counted] = counts.get(counted, 0) + count
            done += len(part.rows)
        if done != len(keys):
            raise ValueError(f"{done} rows were computed for the {len(keys)} keys of {path}.")

    size, checksum = write_content(path, content())
    written = replace(
        manifest, rows=len(keys), width=width, counts=counts, skipped=skipped, bytes=size, checksum=checksum
    )
    written.write(manifest_path(path))
    return written


def write_content(path: AnyPath, parts: Iterable[Any]) -> tuple[int, str]:
    """Write the parts of a file, one after another, and delete its manifest; return its size and its SHA-256."""
    digest, written = hashlib.sha256(), 0
    with atomic_path(path) if isinstance(path, Path) else local_file(path) as temporary:
        with temporary.open("wb") as file:
            for part in parts:
                written += file.write(part)
                digest.update(part)
        manifest_path(path).unlink(missing_ok=True)
    return written, digest.hexdigest()


def _header(keys: np.ndarray, width: int, dtype: str) -> bytes:
    """Return the beginning of a file: what safetensors writes before the rows."""
    size = len(keys) * width * getattr(torch, dtype).itemsize
    described: dict[str, Any] = {
        "keys": {"dtype": "I64", "shape": [len(keys), 2], "data_offsets": [0, keys.nbytes]},
        "rows": {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": [len(keys), width],
            "data_offsets": [keys.nbytes, keys.nbytes + size],
        },
    }
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + np.ascontiguousarray(keys, dtype="<i8").tobytes()


def _stored(rows: Tensor, manifest: StoreManifest, name: Callable[[int], str], first: int) -> Any:
    """Return the bytes of rows in the stored dtype, after checking them; `first` is the number of the first one."""
    rows, stored = rows.detach().cpu(), getattr(torch, manifest.dtype)
    require_finite_rows(rows, lambda row: name(first + row), f"{manifest.about.unit}s")
    if rows.dtype != stored:
        rows = rows.float()
        exceeds = (rows.abs() > torch.finfo(stored).max).any(dim=1).nonzero()
        if len(exceeds):
            raise ValueError(
                f"The embedding of {name(first + int(exceeds[0]))} exceeds the range of {manifest.dtype}; use "
                "bfloat16 or normalize the embeddings."
            )
    return rows.to(stored).contiguous().view(torch.uint8).numpy()


def finished_shard(path: AnyPath, wanted: StoreManifest, contents: bool = False) -> StoreManifest | None:
    """Return the manifest of a shard that is whole, or None if a run has to compute it.

    Args:
        path: `NAME.safetensors`, local or remote.
        wanted: The encoder and the format of the run.
        contents: Compare the content of a local file with its checksum, and not only its size.

    Raises:
        StoreMismatchError: Another encoder made it, or in another format.
    """
    try:
        manifest = StoreManifest.read(manifest_path(path))
        manifest.require_same(wanted, path)
        file = ShardFile.of(path, manifest)
        if contents:
            file.require_unchanged()
        else:
            file.require_size()
    except FileNotFoundError:
        return None
    except StoreDamagedError as error:
        logger.warning("%s. It is computed again.", str(error).partition(";")[0].rstrip("."))
        return None
    return manifest


@contextlib.contextmanager
def shard_lock(path: AnyPath, patience: float = WAIT) -> Iterator[None]:
    """Keep other runs from computing a shard meanwhile, and remove what a killed run left of it.

    An object store has no locks.

    Args:
        patience: Seconds to wait for another run to end.

    Raises:
        ValueError: Another run is writing it.
    """
    if not isinstance(path, Path):
        yield
        return
    with lock_beside(path.with_name(path.name.removesuffix(ROWS_SUFFIX)), patience) as was_killed:
        left = [*leftovers(path), *leftovers(manifest_path(path))] if was_killed else []
        for file in left:
            file.unlink()
        if left:
            logger.info("Removed %d unfinished files of a killed run, such as %s.", len(left), left[0])
        yield


class ShardFile(NamedTuple):
    """A file of a store, with what its manifest says about it.

    Attributes:
        path: `NAME.safetensors`; what is opened is local.
        rows, bytes, checksum: Those of the manifest.
        about: The words of messages.
        origin: Of a copy, the file that it is of, for messages.
    """

    path: Any
    rows: int
    bytes: int
    checksum: str
    about: Kind
    origin: AnyPath | None = None

    @classmethod
    def of(cls, path: AnyPath, manifest: StoreManifest, origin: AnyPath | None = None) -> ShardFile:
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
