"""An index in a folder, local or of an object store: LanceDB tables, and a manifest that names the present one."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import Bitmap, BTree, IvfRq

from llm2clip.files.atomic import read_json, write_json
from llm2clip.files.manifests import FOLDER_MANIFEST, listed_files, read_checked, with_checksum, write_manifest
from llm2clip.files.remote_path import AnyPath, open_path
from llm2clip.files.shared_files import stored_sha256
from llm2clip.search.index_manifest import REBUILD, REPAIR, IndexManifest
from llm2clip.search.lance_rows import LanceRows, readable, wrap_connection_errors, writable
from llm2clip.search.store import KEY, UNINDEXED, VECTOR

MANIFEST, COMMAND = "manifest.json", "index"
TABLES = "images-*.lance"
# What else is in the folder of an index.
OWN = ("rows", "rows-2", "listing-*.arrow", ".*")
OWN_ROWS = ("shard-*", "index.*", ".*")
# The only file that LanceDB writes again: where to look first, in which nothing depends on what is there.
HINT = "_versions/latest_version_hint.json"
# Bits per value of the codes of RaBitQ.
RQ_BITS = 4
# Columns with up to as many distinct values get a bitmap index.
BITMAP_VALUES = 1000


class LanceStore:
    """The index in a folder, local or a URL; see [`IndexStore`].

    In an object store no lock keeps a second run out: the index is that of the one which ends last.
    """

    index_types: tuple[str, ...] = ("flat", "ivf_rq")

    def __init__(self, folder: str | Path) -> None:
        self.folder = open_path(folder)
        self.local_folder = self.folder if isinstance(self.folder, Path) else None
        self.location = str(folder)
        self._rows: LanceRows | None = None

    @property
    def _database(self) -> Any:
        # LanceDB and fsspec have other names for some URLs: each gets the one that was given.
        return lancedb.connect(self.location if self.local_folder is None else str(self.local_folder))

    def require_own(self) -> None:
        with wrap_connection_errors(self.folder):
            if self.folder.is_file():
                raise NotADirectoryError(f"{self.folder} is a file; give the folder of the index: --output-dir FOLDER")
            theirs = [path for path in self.folder.glob("*") if not any(map(path.match, (MANIFEST, TABLES, *OWN)))]
            theirs += [path for path in self.folder.glob("rows*/*") if not any(map(path.match, OWN_ROWS))]
            fields: dict[str, Any] = {}
            with contextlib.suppress(OSError, ValueError):
                fields = read_json(self.folder / MANIFEST)
        if theirs and "format_version" not in fields:
            raise FileExistsError(
                f"{self.folder} is not replaced, because llm2clip {COMMAND} did not write it (there is "
                f"{theirs[0].name}); choose another --output-dir, or delete the folder yourself."
            )

    def metadata(self) -> IndexManifest | None:
        path = self.folder / MANIFEST
        try:
            with wrap_connection_errors(path):
                fields = read_checked(path, by_hand=True)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise ValueError(f"{error}; {REBUILD}") from error
        return IndexManifest.from_fields(str(path), fields)

    def open(self) -> IndexManifest | None:
        manifest = self.metadata()
        while manifest is not None:
            try:
                self._rows = self._open(manifest)
                break
            except (ValueError, ConnectionError):
                now = self.metadata()
                if now is None or now.stored == manifest.stored:
                    raise
                manifest = now  # an update has replaced it meanwhile
        return manifest

    def _open(self, manifest: IndexManifest) -> LanceRows:
        name = manifest.stored.get("table", "")
        if self.local_folder is not None:
            self._require_unchanged(self.local_folder / f"{name}.lance")
        with readable(self.folder):
            rows = LanceRows(self.folder, self._database.open_table(name), manifest)
            count = rows.table.count_rows()
        if count != manifest.images:
            raise ValueError(
                f"the index {self.location} is damaged: its manifest lists {manifest.images} {manifest.embed}s, and "
                f"its table has {count}; {REPAIR}"
            )
        return rows

    def _require_unchanged(self, table: Path) -> None:
        """Compare the files of a table with their checksums, each when it is opened first since it changed."""
        listed = listed_files(table)
        if not listed:
            raise ValueError(f"the index {self.location} is damaged: {table.name} is missing; {REPAIR}")
        for name, file in listed.items():
            path = table / name
            if not path.is_file() or (file.checksum is not None and stored_sha256(path) != file.checksum):
                what = "has changed" if path.is_file() else "is missing"
                raise ValueError(f"the index {self.location} is damaged: {table.name}/{name} {what}; {REPAIR}")

    def keys(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        assert self._rows is not None
        return self._rows.scan(columns)

    def search(self, queries: np.ndarray, k: int, where: str | None = None) -> list[pa.Table]:
        assert self._rows is not None
        try:
            return self._rows.search(queries, k, where)
        except (ValueError, ConnectionError):
            opened, now = self._rows.manifest, self.metadata()
            if now is not None and now.stored == opened.stored:
                raise
            # Updates have deleted the files that were open.
            self._rows = self._open(opened.require_successor(self.location, now))
            return self._rows.search(queries, k, where)

    def replace(self, manifest: IndexManifest, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
        before: dict[str, Any] = {}
        with contextlib.suppress(ValueError):  # a damaged index is replaced
            before = getattr(self.metadata(), "stored", before)
        self._clean(before.get("table"), before.get("previous"))
        name = f"{TABLES.partition('*')[0]}{secrets.token_hex(4)}"
        with writable(self.folder):
            reader = pa.RecordBatchReader.from_batches(schema, batches)
            table = self._database.create_table(name, data=reader, schema=schema)
            rows = LanceRows(self.folder, table, manifest)
            if table.count_rows() != manifest.images:
                raise RuntimeError(f"{table.count_rows()} of {manifest.images} rows were written to {name}.")
            self._index(rows)
        if self.local_folder is not None:
            write_manifest(self.local_folder / f"{name}.lance", COMMAND, unlisted={HINT})
        manifest.stored = {"table": name, "previous": before.get("table")}
        manifest.record_versions(lancedb=lancedb.__version__)
        write_json(self.folder / MANIFEST, with_checksum(asdict(manifest)))
        self._clean(name, before.get("table"))

    def _index(self, rows: LanceRows) -> None:
        for name in sorted(set(rows.columns) - {*UNINDEXED, KEY}):
            kind = rows.table.schema.field(name).type
            has_bitmap = pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
            rows.table.create_index(name, config=Bitmap() if has_bitmap and _has_few_values(rows, name) else BTree())
        index = rows.manifest.index
        if index["type"] == "ivf_rq":
            config = IvfRq(num_bits=RQ_BITS, distance_type="cosine", num_partitions=index["cells"])
            rows.table.create_index(VECTOR, config=config)

    def _clean(self, *kept: str | None) -> None:
        """Delete the tables with other names, which no manifest names."""
        paths: list[AnyPath] = list(self.folder.glob(TABLES))
        for path in paths:
            if path.name.removesuffix(".lance") not in kept:
                _remove_tree(path)


def _has_few_values(rows: LanceRows, column: str) -> bool:
    values: set[Any] = set()
    for batch in rows.scan([column]):
        values |= set(batch[column].unique().to_pylist())
        if len(values) > BITMAP_VALUES:
            return False
    return True


def _remove_tree(path: AnyPath) -> None:
    """Delete a folder; of a remote one the files. The list of its files goes first: without it, it is no table."""
    if isinstance(path, Path):
        (path / FOLDER_MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        return
    if names := path.sizes():
        path.fs.rm([f"{path.path}/{name}" for name in names])
