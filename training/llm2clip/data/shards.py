"""The shards of a streamed source: its files, each with a name that does not depend on where the data lies."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec

from llm2clip.data.captioned_images import captions_by_row
from llm2clip.data.opened_table import SourceError, file_format, open_table
from llm2clip.data.parquet_parts import RowGroups, cut_parquet, part_checksum, rows_of_part
from llm2clip.data.records import column_texts
from llm2clip.data.sources import CaptionSource, select_captions
from llm2clip.data.tar_rows import DAMAGED, Readable, tar_rows
from llm2clip.utils.files import READ_SIZE, sha256
from llm2clip.utils.remote_path import open_once, protocols

# What reading a damaged file raises.
UNREADABLE = (ValueError, TypeError, *DAMAGED)
# Footers of parquet files that are read at the same time.
FOOTERS_AT_ONCE = 16
MAGIC = re.compile(r"[*?\[]")


class HashedReader:
    """Reads a file to its end, and computes the SHA-256 of its bytes.

    Attributes:
        size: Number of bytes that were read.
    """

    def __init__(self, file: Readable) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes."""
        block = self._file.read(size)
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
        part: The part of the file that is meant, of a large parquet file.
    """

    number: int
    path: str
    name: str
    part: RowGroups | None = None


@dataclass
class ShardText:
    """The captions of a shard.

    Attributes:
        captions: The distinct ones, in order of first appearance by row, column and list entry.
        columns: Columns that were read.
        rows: Number of rows.
        size, checksum: Bytes of the file, and its `sha256:`. Of a remote file that is not read to its end, what its
            file system states, or None.
    """

    columns: list[str]
    captions: dict[str, None] = field(default_factory=dict)
    rows: int = 0
    size: int = 0
    checksum: str | None = None

    def add(self, texts: list[str]) -> None:
        """Add the captions of a row."""
        self.rows += 1
        self.captions.update(dict.fromkeys(texts))


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
        opened = open_table(source.path, source.name, source.split, source.revision, streaming=True)
        table = select_captions(source, opened)
        assert isinstance(table, datasets.IterableDataset)
        if not opened.files or table.num_shards != len(opened.files):
            raise SourceError(
                f"{source.path} (split {source.split}) is not a list of files, which embeddings could lie beside. Use "
                "webdataset tars or parquet, json or csv files, and one split; or embed into a cache (store: cache)."
            )
        self.opened = opened
        self.source, self._table, self._is_webdataset = source, table, opened.is_webdataset
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
        """Read the captions of a shard or part: those that training sees. A tar is read once, with its checksum.

        Raises:
            SourceError: The file cannot be read, is cut short, or a caption is not text.
        """
        text = ShardText(list(self.source.caption_columns))
        try:
            if self._is_webdataset and file_format(shard.path) == ".tar":
                self._read_tar(shard, text)
            elif shard.part is not None:
                text.size, text.checksum = source_size(shard.path), source_checksum(shard.path, shard.part)
                for row in rows_of_part(shard.path, shard.part, list(self._table.features or ())):
                    self._add(row, text)
            else:
                text.size, text.checksum = source_size(shard.path), source_checksum(shard.path)
                table = self._table if len(self.shards) == 1 else self._table.shard(len(self.shards), shard.number)
                for rows in captions_by_row(table, self.source.caption_columns):
                    for texts in rows:
                        text.add(texts)
        except SourceError:
            raise
        except UNREADABLE as error:
            raise SourceError(f"{shard.path} cannot be read: {error or type(error).__name__}") from error
        return text

    def _read_tar(self, shard: SourceShard, text: ShardText) -> None:
        features = self._table.features
        assert features is not None  # `datasets` takes those of a tar from its first rows
        columns = list(features)
        with open_once(shard.path) as file:
            hashed = HashedReader(file)
            for values in tar_rows(shard.path, hashed, columns):
                self._add(features.encode_example(values), text)
            text.checksum = f"sha256:{hashed.checksum()}"
        text.size = hashed.size

    def _add(self, row: dict[str, Any], text: ShardText) -> None:
        text.add([found for column in self.source.caption_columns for found in column_texts(row, column)])


def source_size(path: str) -> int:
    """Return the size of a local or remote file in bytes."""
    files, name = fsspec.core.url_to_fs(path)
    return int(files.size(name))


def source_checksum(path: str, part: RowGroups | None = None) -> str | None:
    """Return the SHA-256 of a local file, or of the bytes of a part of it.

    Of a remote file it is what its file system states without reading it, or None.
    """
    files, name = fsspec.core.url_to_fs(path)
    if "file" in protocols(files):
        local = Path(name)
        return f"sha256:{sha256(local) if part is None else part_checksum(local, part.first_byte, part.last_byte)}"
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
