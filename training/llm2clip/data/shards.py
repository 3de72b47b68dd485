"""The shards of a streamed source: its files, each with a name that does not depend on where the data lies."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets

from llm2clip.data.captioned_images import captions_by_row
from llm2clip.data.sources import CaptionSource, SourceError, open_table, select_captions

MAGIC = re.compile(r"[*?\[]")


class SourceShard(NamedTuple):
    """A file of a source.

    Attributes:
        number: Its place among the files of the source.
        path: Path or URL.
        name: Path below the folder of the source, with `/`; the same wherever that folder lies.
    """

    number: int
    path: str
    name: str


class ShardedSource:
    """A streamed source as its files, which are read one at a time.

    Args:
        source: A source with `streaming`, of one split and without `max_samples`.

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
        self.source, self._table = source, table
        self.shards = name_shards(source.path, opened.files)

    def captions(self, shard: SourceShard) -> Iterator[list[list[str]]]:
        """Yield the captions of each row of a shard, by column and list entry, a thousand rows at a time."""
        table = self._table if len(self.shards) == 1 else self._table.shard(len(self.shards), shard.number)
        return captions_by_row(table, self.source.caption_columns)


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
