"""Keys of images: hashes of their encoded bytes, computed once per table."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from llm2clip.data.table_identity import table_identity
from llm2clip.utils.files import digest_json
from llm2clip.utils.progress import ProgressBar
from llm2clip.utils.shared_files import shared_file

# Of the function that makes a key.
VERSION = 1
BATCH = 256
NO_IMAGE: dict[str, Any] = {"bytes": None, "path": None}
# Images of a table whose bytes tell whether all are the same.
SAMPLED = 64


def image_keys(table: datasets.Dataset, column: str) -> np.ndarray:
    """Hash the encoded images of a column of `Image(decode=False)`: (rows, 2) int64, mapped into memory.

    The hashes are 128-bit BLAKE2b. They are computed once per table and machine; those of files again if the path,
    size or time of a file has changed. An image that is not there has the key of its path.
    """
    images = table.select_columns([column])
    identity = {"version": VERSION, "table": table_identity(images), "files": _files(images, column)}

    def write(path: Path) -> None:
        with path.open("wb") as file, ProgressBar("Hashing images", len(images), "image", len(images) > BATCH) as bar:
            for start in range(0, len(images), BATCH):
                values = images[start : start + BATCH][column]
                file.write(b"".join(_digest(value or NO_IMAGE) for value in values))
                bar.update(len(values))

    path = shared_file("image-keys", identity, write)
    return np.memmap(path, dtype="<i8", mode="r", shape=(len(images), 2))


def content_keys(images: Iterable[bytes | str | os.PathLike[str]]) -> np.ndarray:
    """Hash encoded images, or the files of paths, as [`image_keys`] does: (images, 2) int64; nothing is stored.

    Raises:
        TypeError: An image is neither encoded bytes nor a path.
    """
    digests = b"".join(_digest(_record(image)) for image in images)
    return np.frombuffer(digests, dtype="<i8").reshape(-1, 2).astype(np.int64, copy=False)


def sampled_keys(table: datasets.Dataset, column: str) -> list[str]:
    """Hash the encoded images of some rows of a column of `Image(decode=False)`, the same rows of equally many."""
    images = table.select_columns([column])
    rows = np.unique(np.linspace(0, len(images) - 1, SAMPLED).astype(int)) if len(images) else np.empty(0, int)
    sampled = images.select(rows)[column] if len(rows) else []
    return [_digest(value or NO_IMAGE).hex() for value in sampled]


def _record(image: Any) -> dict[str, Any]:
    return {"bytes": image, "path": None} if isinstance(image, bytes) else {"bytes": None, "path": os.fspath(image)}


def _digest(record: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(_content(record), digest_size=16).digest()


def _files(images: datasets.Dataset, column: str) -> str:
    """Hash the paths, sizes and times of the files of a table, as far as images are files; reads no image."""
    found: list[list[Any]] = []
    for batch in images.with_format("arrow").iter(BATCH):
        records = batch.column(column).combine_chunks()
        is_file = pc.is_null(pc.struct_field(records, "bytes"))
        for path in pc.struct_field(records, "path").filter(is_file).to_pylist():
            state = os.stat(path) if path is not None and os.path.exists(path) else None
            found.append([path, *((state.st_size, state.st_mtime_ns, state.st_ctime_ns) if state is not None else ())])
    return digest_json(found)


def _content(record: Mapping[str, Any]) -> bytes:
    """Return the encoded bytes of an image, of which `datasets` has either these or a path."""
    if record["bytes"] is not None:
        return record["bytes"]
    path = record["path"]
    if path is not None and os.path.isfile(path):
        return Path(path).read_bytes()
    return b"\x00no file: " + str(path).encode()
