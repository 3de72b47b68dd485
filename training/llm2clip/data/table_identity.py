"""What identifies data: the rows and images of a table, the files of a stream, a commit on the Hub, local files."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from llm2clip.command_line.progress import ProgressBar
from llm2clip.files.atomic import digest_json
from llm2clip.files.shared_files import shared_file

logger = logging.getLogger(__name__)

BATCH = 1000
# Version of the function that hashes rows.
DIGEST_VERSION = 1
# Files of a stream that are hashed, which may be many and large; bytes of both ends.
SAMPLED_FILES, EDGE = 64, 2**16
COMMIT = re.compile(r"[0-9a-f]{40}")
# Version of the function that makes a key.
KEY_VERSION = 1
IMAGE_BATCH = 256
NO_IMAGE: dict[str, Any] = {"bytes": None, "path": None}
# Images of a table whose bytes tell whether all are the same.
SAMPLED = 64


def table_identity(table: datasets.Dataset) -> str:
    """Identify the rows of a table by the fingerprint that `datasets` names its own cached files after."""
    return table._fingerprint


def rows_digest(table: datasets.Dataset) -> str:
    """Hash the values of the rows of a table in their order; of equal rows in other files, it is the same."""

    def write(path: Path) -> None:
        digest = hashlib.sha256()
        for batch in table.iter(BATCH):
            digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
        path.write_text(digest.hexdigest()[:16])

    return shared_file("rows", {"version": DIGEST_VERSION, "table": table_identity(table)}, write).read_text()


def sampled_files_digest(files: Sequence[str]) -> str:
    """Hash the sizes of local files in their order, and of some of them both ends; those of URLs are not read."""
    local = [Path(file) for file in files if os.path.isfile(file)]
    digest = hashlib.sha256(json.dumps([file.stat().st_size for file in local]).encode())
    for position in np.unique(np.linspace(0, len(local) - 1, SAMPLED_FILES).astype(int)) if local else ():
        _add_ends(digest, local[position])
    return digest.hexdigest()[:16]


def data_revision(source: str | Mapping[str, Any], at_file: Callable[[], None] = lambda: None) -> str | None:
    """Identify the present content of a data set.

    Args:
        source: A path, or a mapping with fields of `CaptionSource`, of which `path`, `name` and `revision` are used.
        at_file: Called before each local file, which may be many; its errors end the reading.

    Returns:
        For a data set on the Hub, its commit; offline, the commit in the cache of `datasets`. For local files, a
        checksum (16 hexadecimal digits) of their relative paths, their sizes, and their first and last 64 KiB, which
        is quick for terabytes too. For a URL, or when the commit is unknown, the given revision.
    """
    fields = {"path": source} if isinstance(source, str) else source
    path, revision = fields["path"], fields.get("revision")
    local = Path(path).expanduser()
    if local.is_dir():
        names = (file.relative_to(local) for file in local.rglob("*"))
        found = (local / name for name in names if not any(part[0] == "." for part in name.parts))
        return _checksum(local, found, at_file)
    if "://" in path:
        return revision
    files = [local] if local.is_file() else [Path(file) for file in glob.glob(str(local), recursive=True)]
    if files:
        return _checksum(Path(os.path.commonpath([file.parent for file in files])), files, at_file)
    try:
        commit = datasets.load_dataset_builder(path, fields.get("name"), revision=revision).hash
    except Exception as error:  # network errors have many types, and none of them may lose the results
        logger.warning("the commit of %s is unknown: %s", path, error)
        return revision
    return commit if commit is not None and COMMIT.fullmatch(commit) else revision


def _checksum(folder: Path, files: Iterable[Path], at_file: Callable[[], None]) -> str:
    digest, listed = hashlib.sha256(), list[Path]()
    for file in files:
        at_file()
        if file.is_file():
            listed.append(file)
    for path in sorted(listed):
        at_file()
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        _add_ends(digest, path)
    return digest.hexdigest()[:16]


def _add_ends(digest: Any, path: Path) -> None:
    with open(path, "rb") as file:
        digest.update(file.read(EDGE))
        file.seek(max(EDGE, path.stat().st_size - EDGE))
        digest.update(file.read())


def image_keys(table: datasets.Dataset, column: str) -> np.ndarray:
    """Hash the encoded images of a column of `Image(decode=False)`: (rows, 2) int64, mapped into memory.

    The hashes are 128-bit BLAKE2b. They are computed once per table and machine; those of files again if the path,
    size or time of a file has changed. An image that is not there has the key of its path.
    """
    images = table.select_columns([column])
    identity = {"version": KEY_VERSION, "table": table_identity(images), "files": _files(images, column)}

    def write(path: Path) -> None:
        with (
            path.open("wb") as file,
            ProgressBar("Hashing images", len(images), "image", len(images) > IMAGE_BATCH) as bar,
        ):
            for start in range(0, len(images), IMAGE_BATCH):
                values = images[start : start + IMAGE_BATCH][column]
                file.write(b"".join(_digest(value or NO_IMAGE) for value in values))
                bar.update(len(values))

    path = shared_file("image-keys", identity, write)
    return np.memmap(path, dtype="<i8", mode="r", shape=(len(images), 2))


def content_keys(images: Iterable[bytes | str | os.PathLike[str]]) -> np.ndarray:
    """Hash encoded images, or the files of paths, as [`image_keys`] does: (images, 2) int64; nothing is stored.

    Raises:
        TypeError: An image is neither encoded bytes nor a path.
    """
    records = ((image, None) if isinstance(image, bytes) else (None, os.fspath(image)) for image in images)
    digests = b"".join(_digest({"bytes": content, "path": path}) for content, path in records)
    return np.frombuffer(digests, dtype="<i8").reshape(-1, 2).astype(np.int64, copy=False)


def sampled_keys(table: datasets.Dataset, column: str) -> list[str]:
    """Hash the encoded images of some rows of a column of `Image(decode=False)`, the same rows of equally many."""
    images = table.select_columns([column])
    rows = np.unique(np.linspace(0, len(images) - 1, SAMPLED).astype(int)) if len(images) else np.empty(0, int)
    sampled = images.select(rows)[column] if len(rows) else []
    return [_digest(value or NO_IMAGE).hex() for value in sampled]


def _digest(record: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(_content(record), digest_size=16).digest()


def file_paths(images: datasets.Dataset, column: str) -> Iterator[str | None]:
    """Yield the path of each image of a column of `Image(decode=False)` that is a file, and None of others."""
    for batch in images.select_columns([column]).with_format("arrow").iter(IMAGE_BATCH):
        records = batch.column(column).combine_chunks()
        is_file = pc.is_null(pc.struct_field(records, "bytes"))
        yield from pc.if_else(is_file, pc.struct_field(records, "path"), None).to_pylist()


def distinct(ids: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Return where each distinct id stands first, and the number of each id among the distinct ones."""
    first: dict[Hashable, int] = {}
    for position, identity in enumerate(ids):
        first.setdefault(identity, position)
    numbers = {identity: number for number, identity in enumerate(first)}
    return list(first.values()), [numbers[identity] for identity in ids]


def _files(images: datasets.Dataset, column: str) -> str:
    """Hash the paths, sizes and times of the files of a table; reads no image."""
    states: list[list[Any]] = []
    for path in filter(None, file_paths(images, column)):
        state = os.stat(path) if os.path.exists(path) else None
        states.append([path, *((state.st_size, state.st_mtime_ns, state.st_ctime_ns) if state is not None else ())])
    return digest_json(states)


def _content(record: Mapping[str, Any]) -> bytes:
    """Return the encoded bytes of an image, of which `datasets` has either these or a path."""
    if record["bytes"] is not None:
        return record["bytes"]
    path = record["path"]
    if path is not None and os.path.isfile(path):
        return Path(path).read_bytes()
    return b"\x00no file: " + str(path).encode()
