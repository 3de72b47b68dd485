"""The shards of a streamed source: its files, each with a name that does not depend on where the data lies."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import fsspec

from llm2clip.data.captioned_images import column_texts
from llm2clip.data.formats import SourceError
from llm2clip.data.shard_rows import RowRange, cut_parquet, open_shards
from llm2clip.data.sources import CaptionSource, open_source
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.files.remote_path import protocols
from llm2clip.files.shared_files import shared_file

# Footers of parquet files that are read at the same time.
FOOTERS_AT_ONCE = 16
MAGIC = re.compile(r"[*?\[]")
# How what the captions of a local file are known by begins.
BY_CAPTIONS = "captions:"


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
        size, checksum: Bytes of the file, and what its captions are known by; see [`source_checksum`].
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
        _, rows = open_shards(source, opened, with_images=False)
        if not rows.files:
            raise SourceError(
                f"{source.path} (split {source.split}) is not a list of files, which embeddings could lie beside. Use "
                "webdataset tars or parquet, json or csv files, and one split; or embed into a cache (store: cache)."
            )
        self.opened, self.source = opened, source
        self._rows = rows
        self.shards = name_shards(source.path, opened.files)

    def cut(self, captions: int, text_bytes: int) -> list[list[SourceShard]]:
        """Return the shards, and of each parquet file with more than so many captions or bytes of them its parts."""
        columns = self.source.caption_columns

        def parts(shard: SourceShard) -> list[SourceShard]:
            is_parquet = shard.path.endswith(".parquet")
            ranges = cut_parquet(shard.path, columns, captions, text_bytes) if is_parquet else []
            return [shard._replace(part=part) for part in ranges] or [shard]

        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            return list(pool.map(parts, self.shards))

    def read(self, shard: SourceShard) -> ShardText:
        """Read the captions of a shard or part: those that training sees.

        Raises:
            SourceError: The file cannot be read, is cut short, or a caption is not text.
        """
        text, digest = ShardText(list(self.source.caption_columns)), hashlib.sha256()
        part = None if shard.part is None else range(*shard.part[:2])
        with wrap_read_errors(shard.path, SourceError):
            text.size = source_size(shard.path)
            for _, row in self._rows.read(shard.number, part):
                captions = [column_texts(row, column) for column in text.columns]
                digest.update(json.dumps(captions).encode())
                text.captions.update(dict.fromkeys(caption for texts in captions for caption in texts))
                text.rows += 1
            text.checksum = BY_CAPTIONS + digest.hexdigest() if _is_local(shard.path) else stated_checksum(shard.path)
        return text


def source_size(path: str) -> int:
    """Return the size of a local or remote file in bytes."""
    files, name = fsspec.core.url_to_fs(path)
    return int(files.size(name))


def read_captions(path: str, columns: Sequence[str], part: RowRange | None = None) -> ShardText:
    """Read the captions of a file or a part of it, in these columns; see [`ShardedSource.read`]."""
    source = ShardedSource(CaptionSource(path, caption_columns=list(columns), streaming=True))
    return source.read(source.shards[0]._replace(part=part))


def source_checksum(path: str, columns: Sequence[str], part: RowRange | None = None) -> str | None:
    """Return what the captions of a file, or of a part of it, are known by.

    Of a local file it is the SHA-256 of those in these columns, by row, which are read once on this machine as long as
    the file stays as it is; images are not read. Of a remote file it is what its file system states without reading
    it, or None.

    Raises:
        SourceError: The file cannot be read, or lacks a column.
    """
    if not _is_local(path):
        return stated_checksum(path)
    status = os.stat(path)
    state = status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
    identity = {"path": os.path.abspath(path), "state": state, "columns": list(columns), "part": part}
    kept = shared_file("captions", identity, lambda file: _write(file, read_captions(path, columns, part)))
    return kept.read_text(encoding="utf-8")


def _write(file: Path, text: ShardText) -> None:
    file.write_text(str(text.checksum), encoding="utf-8")


def stated_checksum(path: str) -> str | None:
    """Return what the file system of a remote file states by which its content is known, or None."""
    files, name = fsspec.core.url_to_fs(path)
    entry = files.info(name)
    stated = next((entry[field] for field in ("ETag", "etag", "md5", "sha256") if entry.get(field)), None)
    return None if stated is None else f"stated:{stated}"


def _is_local(path: str) -> bool:
    return "file" in protocols(fsspec.core.url_to_fs(path)[0])


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
