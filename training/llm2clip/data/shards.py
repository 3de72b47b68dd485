"""The shards of a streamed source: its files, each with a name that does not depend on where the data lies."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec

from llm2clip.data.captioned_images import column_texts
from llm2clip.data.opened_table import SourceError, file_format
from llm2clip.data.shard_rows import RowRange, ShardRows, cut_parquet
from llm2clip.data.sources import CaptionSource, open_source, select_captions
from llm2clip.data.tars import tar_rows
from llm2clip.utils.files import READ_SIZE
from llm2clip.utils.library_errors import wrap_read_errors
from llm2clip.utils.remote_path import open_once, protocols
from llm2clip.utils.shared_files import stored_sha256

# Footers of parquet files that are read at the same time.
FOOTERS_AT_ONCE = 16
MAGIC = re.compile(r"[*?\[]")


class HashedReader:
    """Reads a file to its end, and computes the SHA-256 of its bytes.

    Attributes:
        size: Number of bytes that were read.
    """

    def __init__(self, file: Any) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes."""
        block: bytes = self._file.read(size)
        self._digest.update(block)
        self.size += len(block)
        return block

    def checksum(self) -> str:
        """Read the rest, and return the SHA-256 of the file in hexadecimal digits."""
        while self.read(READ_SIZE):
            pass
        return self._digest.hexdigest()


class SourceShard(NamedTuple):
    """A file of a source.

    Attributes:
        number: Its place among the files of the source.
        path: Path or URL.
        name: Path below the folder of the source, with `/`; the same wherever that folder lies.
        part: The rows that are meant, of a large parquet file.
    """

    number: int
    path: str
    name: str
    part: RowRange | None = None


@dataclass
class ShardText:
    """The captions of a shard.

    Attributes:
        captions: The distinct ones, in order of first appearance by row, column and list entry.
        columns: Columns that were read.
        rows: Number of rows.
        size, checksum: Bytes of the file, and its checksum; see [`source_checksum`].
    """

    columns: list[str]
    captions: dict[str, None] = field(default_factory=dict)
    rows: int = 0
    size: int = 0
    checksum: str | None = None


class ShardedSource:
    """A streamed source as its files, which are read one at a time.

    Args:
        source: A source with `streaming`, of one split and without `max_samples`.

    Attributes:
        opened: Its table, with all columns.

    Raises:
        FileNotFoundError, SourceError: The source cannot be read, or is not a list of files.
    """

    def __init__(self, source: CaptionSource) -> None:
        if not source.streaming or source.max_samples is not None:
            raise SourceError(f"{source.path} is read by shard: set streaming: true, and leave max_samples unset.")
        opened = open_source(source)
        table = select_captions(source, opened)
        assert isinstance(table, datasets.IterableDataset)
        if not opened.files or table.num_shards != len(opened.files):
            raise SourceError(
                f"{source.path} (split {source.split}) is not a list of files, which embeddings could lie beside. Use "
                "webdataset tars or parquet, json or csv files, and one split; or embed into a cache (store: cache)."
            )
        self.opened, self.source = opened, source
        self._rows = ShardRows(table, list(table.features or ()), opened.files, source.caption_columns)
        self.shards = name_shards(source.path, opened.files)

    def cut(self, part_rows: int) -> list[list[SourceShard]]:
        """Return the shards, and of each parquet file with more than `part_rows` rows its parts.

        A file with a single row group stays whole.
        """

        def parts(shard: SourceShard) -> list[SourceShard]:
            found = cut_parquet(shard.path, part_rows) if shard.path.endswith(".parquet") else []
            return [shard._replace(part=part) for part in found] or [shard]

        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            return list(pool.map(parts, self.shards))

    def read(self, shard: SourceShard) -> ShardText:
        """Read the captions of a shard or part: those that training sees.

        Raises:
            SourceError: The file cannot be read, is cut short, or a caption is not text.
        """
        text = ShardText(list(self.source.caption_columns))
        start, stop = (0, None) if shard.part is None else shard.part[:2]
        with wrap_read_errors(shard.path, SourceError):
            if "://" in shard.path and file_format(shard.path) == ".tar":
                self._read_remote_tar(shard, text)
            else:
                text.size, text.checksum = source_size(shard.path), source_checksum(shard.path)
                self._add(self._rows.read(shard.number, start, stop), text)
        return text

    def _read_remote_tar(self, shard: SourceShard, text: ShardText) -> None:
        """Read a tar at a URL once, with its checksum."""
        with open_once(shard.path) as file:
            hashed = HashedReader(file)
            rows = tar_rows(shard.path, self._rows.columns, file=hashed)
            self._add(((number, self._rows.declared(row)) for number, row in rows), text)
            text.checksum = f"sha256:{hashed.checksum()}"
        text.size = hashed.size

    def _add(self, rows: Iterable[tuple[int, dict[str, Any]]], text: ShardText) -> None:
        for _, row in rows:
            found = [caption for column in text.columns for caption in column_texts(row, column)]
            text.captions.update(dict.fromkeys(found))
            text.rows += 1


def source_size(path: str) -> int:
    """Return the size of a local or remote file in bytes."""
    files, name = fsspec.core.url_to_fs(path)
    return int(files.size(name))


def source_checksum(path: str) -> str | None:
    """Return the SHA-256 of a local file, computed once on this machine as long as the file stays as it is.

    Of a remote file it is what its file system states without reading it, or None.
    """
    files, name = fsspec.core.url_to_fs(path)
    if "file" in protocols(files):
        return f"sha256:{stored_sha256(Path(name))}"
    entry = files.info(name)
    stated = next((entry[field] for field in ("ETag", "etag", "md5", "sha256") if entry.get(field)), None)
    return None if stated is None else f"stated:{stated}"


def name_shards(source: str, files: list[str]) -> list[SourceShard]:
    """Name the files of a source relative to its folder: the one given, or the last one before a wildcard."""
    is_url = "://" in source
    local = os.path.expanduser(source)
    if is_url or not Path(local).is_dir():
        start = MAGIC.split(source if is_url else local)[0]
        root = start.rpartition("/")[0] if is_url else os.path.dirname(start)
    else:
        root = local
    root = root if is_url else os.path.abspath(root)
    below = [_below(root, file) for file in files]
    if None in below:  # a data set of the Hub, or a link out of the folder
        scheme, separator, _ = files[0].rpartition("://")
        root = posixpath.commonpath([posixpath.dirname(file.rpartition("://")[2]) for file in files])
        root = f"{scheme}{separator}{root}"
        below = [_below(root, file) for file in files]
    return [
        SourceShard(number, file, name or posixpath.basename(file))
        for number, (file, name) in enumerate(zip(files, below, strict=True))
    ]


def _below(root: str, file: str) -> str | None:
    """Return the path of a file below a folder, or None if it is elsewhere."""
    if "://" in file:
        prefix = root.rstrip("/") + "/"
        return file.removeprefix(prefix) if file.startswith(prefix) else None
    relative = os.path.relpath(file, root)
    return None if relative.startswith(os.pardir) else Path(relative).as_posix()
