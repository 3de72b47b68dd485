"""An index in a folder, local or of an object store: a LanceDB table, and a manifest that names its complete version.

A version of the table appears in one step, as one file that names others; so does the manifest, which is written last.
In an object store no lock keeps a second run out: it is noticed by the versions that it adds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import Bitmap, BTree, IvfRq, IvfSq

from llm2clip.files.atomic import remove_unfinished, write_json
from llm2clip.files.locks import LOCK, folder_lock
from llm2clip.files.manifests import (
    FOLDER_MANIFEST,
    faults,
    listed_files,
    own_files,
    read_checked,
    with_checksum,
    write_manifest,
)
from llm2clip.files.remote_path import AnyPath, local_file, open_path
from llm2clip.files.shared_files import stored_sha256
from llm2clip.search.faiss_vectors import build_faiss
from llm2clip.search.index_manifest import REBUILD, IndexManifest
from llm2clip.search.lance_rows import LanceRows, readable, wrap_connection_errors, writable
from llm2clip.search.store import KEY, NUMBER, REASON, UNINDEXED, VECTOR, Base, is_changed

logger = logging.getLogger(__name__)

MANIFEST, FAILURES, TABLE = "manifest.json", "failures.json", "images"
# The only file that LanceDB writes again: where to look first, in which nothing depends on what is there.
HINT = f"{TABLE}.lance/_versions/latest_version_hint.json"
COMMAND = "index"
# In the schema of the table: the manifest with which a run began.
RUN_MANIFEST = b"llm2clip"
# Versions stay for readers that have them open, and so do files that no version names.
KEPT = timedelta(days=7)
# Until the manifest names a new version, none is deleted: the one that it names may be of any age.
NEVER = timedelta(days=365_000)
# Time that cleaning takes at most.
CLEANING = timedelta(hours=1)
VECTOR_INDEX = f"{VECTOR}_idx"
# Bits per value of the codes of RaBitQ; those of int8 are LanceDB's IVF_SQ, which is built ten times faster.
RQ_BITS = {None: 4, "binary": 1}
# An index of the embeddings is trained again when it has grown by this share, or is in as many pieces.
GROWTH, MAX_PIECES = 0.2, 8
# Columns with up to as many distinct values get a bitmap index.
BITMAP_VALUES = 1000
DELETE_AT_ONCE, MAX_OPTIMIZE = 10_000, 8


class LanceStore:
    """The index in a folder, local or a URL; see [`IndexStore`]. Each call that writes makes a version of the table.

    Where no lock keeps other runs out, these calls raise ValueError if another run has made a version. Two that write
    in the same moment both do so; rows that are then there twice are deleted by the next run.
    """

    index_types: tuple[str, ...] = ("flat", "ivf_rq", "faiss")

    def __init__(self, folder: str | Path) -> None:
        self.folder = open_path(folder)
        self.location = str(folder)
        # Whether no other run has been noticed.
        self._is_alone = True
        # The rows of the last commit, and the table that a run writes, with its first and last version.
        self._committed: LanceRows | None = None
        self._written: Any = None
        self._first = self._version = 0

    @property
    def _database(self) -> Any:
        # LanceDB and fsspec have other names for some URLs: each gets the one that was given.
        return lancedb.connect(str(self.folder) if isinstance(self.folder, Path) else self.location)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        self._require_own()
        with contextlib.ExitStack() as stack:
            if isinstance(self.folder, Path):
                stack.enter_context(folder_lock(self.folder, patience=0))
                remove_unfinished(self.folder)
            stack.callback(self._remove_empty)
            yield

    def _require_own(self) -> None:
        with wrap_connection_errors(self.folder):
            if self.folder.is_file():
                raise NotADirectoryError(f"{self.folder} is a file; give the folder of the index: --output-dir FOLDER")
            there = {path.name for path in self.folder.glob("*")}
        if there - {LOCK} and own_files(self.folder, COMMAND) is None:
            raise FileExistsError(
                f"{self.folder} is not replaced, because llm2clip {COMMAND} did not write it (no {FOLDER_MANIFEST} "
                "that says so); choose another --output-dir, or delete the folder yourself."
            )

    def _remove_empty(self) -> None:
        if not self._is_alone or (self.folder / MANIFEST).is_file():
            return
        if not self._has_table() or (self._written is not None and not self._written.count_rows()):
            _remove_tree(self.folder)

    def metadata(self, unfinished: bool = False) -> IndexManifest | None:
        if unfinished:
            return self._unfinished()
        manifest = self._manifest()
        if manifest is not None:
            self._require_unchanged()
            self._open_rows(manifest)
        return manifest

    def _manifest(self) -> IndexManifest | None:
        path = self.folder / MANIFEST
        try:
            with wrap_connection_errors(path):
                fields = read_checked(path, by_hand=True)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise ValueError(f"{error}; {REBUILD}") from error
        return IndexManifest.from_fields(str(path), fields)

    def _unfinished(self) -> IndexManifest | None:
        if not self._has_table():
            return None
        committed = self._manifest()
        try:
            table = self._open(None)
        except ValueError:
            if committed is not None:
                raise
            logger.warning("what an unfinished run has left in %s cannot be read; it is dropped.", self.location)
            return None
        if committed is not None and committed.stored.get("version") == table.version:
            return None
        fields = json.loads((table.schema.metadata or {}).get(RUN_MANIFEST, b"{}"))
        return IndexManifest.from_fields(self.location, fields)

    def _open_rows(self, manifest: IndexManifest) -> None:
        """Open the rows of a commit for searches; ValueError if they are damaged."""
        rows = LanceRows(self.folder, self._open(manifest.stored.get("version", 0)), manifest)
        with readable(self.folder):
            count = rows.table.count_rows()
        if count != manifest.images:
            raise ValueError(
                f"the index {self.location} is damaged: its manifest lists {manifest.images} {manifest.embed}s, and "
                f"its table has {count}; {REBUILD}"
            )
        if manifest.index["type"] == "faiss":
            rows.open_faiss()  # now, so that damage is found
        self._committed = rows

    def _require_unchanged(self) -> None:
        """Compare rows and vectors with their checksums, each file when it is opened first since it changed."""
        if not isinstance(self.folder, Path):
            return
        with contextlib.suppress(FileNotFoundError):
            for name, listed in listed_files(self.folder).items():
                path = self.folder / name
                # What an update writes and deletes meanwhile is no damage.
                is_stored = name.startswith(f"{TABLE}.lance/") or path.suffix == ".faiss"
                if is_stored and listed.checksum and path.is_file() and stored_sha256(path) != listed.checksum:
                    raise ValueError(f"the index {self.location} is damaged: {name} has changed; {REBUILD}")

    def begin(self, manifest: IndexManifest, schema: pa.Schema, base: Base) -> None:
        if base == "nothing":
            self._clear_unreadable()
            if own_files(self.folder, COMMAND) is None:
                write_manifest(self.folder, COMMAND)  # from here on the folder is known to be ours
            schema = schema.with_metadata({RUN_MANIFEST: json.dumps(asdict(manifest)).encode()})
            # A new version of the table, so that readers of the old ones go on.
            mode = "overwrite" if self._has_table() else "create"
            with writable(self.folder):
                self._written = self._database.create_table(TABLE, schema=schema, mode=mode)
        else:
            self._written = self._open(None)
            committed = self._manifest()
            if base == "commit" and committed is not None and committed.stored["version"] != self._written.version:
                self._written.checkout(committed.stored["version"])
                with writable(self.folder):
                    self._written.restore()  # as a new version
        self._first = self._version = self._written.version

    def keys(self, columns: Sequence[str] | None, written: bool = False) -> Iterator[pa.RecordBatch]:
        rows = LanceRows(self.folder, self._written) if written else self._committed
        assert rows is not None
        return rows.scan(columns)

    def vectors(self, numbers: np.ndarray) -> pa.Table:
        return LanceRows(self.folder, self._written).take(numbers, [VECTOR, REASON])

    def upsert(self, rows: pa.Table) -> None:
        schema = self._written.schema.remove_metadata()
        with self._alone():
            self._written.add(rows.select(schema.names).cast(schema))

    def delete(self, numbers: np.ndarray) -> None:
        for start in range(0, len(numbers), DELETE_AT_ONCE):
            some = ",".join(map(str, numbers[start : start + DELETE_AT_ONCE].tolist()))
            with self._alone():
                self._written.delete(f"{NUMBER} IN ({some})")

    def search(self, queries: np.ndarray, k: int, where: str | None = None) -> list[pa.Table]:
        assert self._committed is not None
        return self._committed.search(queries, k, where)

    def commit(self, manifest: IndexManifest, failures: list[dict[str, Any]]) -> None:
        with writable(self.folder):
            self._commit(manifest, failures)

    def _commit(self, manifest: IndexManifest, failures: list[dict[str, Any]]) -> None:
        self._require_version(self._version)
        previous = None
        with contextlib.suppress(ValueError):  # a damaged index is replaced
            previous = self._manifest()
        if previous is not None and previous.stored.get("version") == self._version:
            with contextlib.suppress(OSError, ValueError):
                listed = json.loads((self.folder / FAILURES).read_text("utf-8"))
                if not is_changed(manifest, failures, previous, listed):
                    return
        if self._written.count_rows(f"{REASON} IS NOT NULL"):
            self._written.delete(f"{REASON} IS NOT NULL")
        self._optimize()
        self._index_columns()
        manifest.stored = {}
        if manifest.index["type"] == "ivf_rq":
            self._index_vectors(manifest, previous)
        elif self._has_vector_index():
            self._written.drop_index(VECTOR_INDEX)
        if manifest.index["type"] == "faiss":
            self._write_faiss(manifest)
        self._optimize()
        manifest.stored["version"] = self._written.version
        manifest.record_versions(lancedb=lancedb.__version__)
        write_json(self.folder / FAILURES, failures)
        self._list_files(without=(MANIFEST,))  # before the manifest names them
        self._require_version(manifest.stored["version"])
        if self._written.count_rows() != manifest.images:
            self._stop()
        write_json(self.folder / MANIFEST, with_checksum(asdict(manifest)))
        self._clean(manifest, previous)
        self._list_files()

    def _list_files(self, without: tuple[str, ...] = ()) -> None:
        """Bring the files of the index to the disk, and list them with checksums.

        Args:
            without: Files that are about to be replaced, so that the list would be of others.
        """
        write_manifest(self.folder, COMMAND, unlisted={*without, HINT, LOCK}, checksum=stored_sha256)

    def faults(self) -> Iterator[str]:
        """Yield what differs between the files of the index and their list, in words."""
        # That of an index at a URL, or of its copy, has sizes alone, which may be those before the last change.
        if isinstance(self.folder, Path) and any(listed.checksum for listed in listed_files(self.folder).values()):
            yield from faults(self.folder)

    def _has_table(self) -> bool:
        with wrap_connection_errors(self.folder):
            return (self.folder / f"{TABLE}.lance").is_dir()

    def _clear_unreadable(self) -> None:
        """Delete the files of an index that nobody can read: not finished, of another format, or damaged."""
        with contextlib.suppress(ValueError):
            manifest = self._manifest()
            # First, since LanceDB may panic over a damaged table, or wait for ever.
            if manifest is not None and not any(self.faults()):
                self._open_rows(manifest)
                self._open(None)
                return
        for name in own_files(self.folder, COMMAND) or ():
            (self.folder / name).unlink(missing_ok=True)
        _remove_tree(self.folder / f"{TABLE}.lance")
        self._list_files()  # the names come again, for other files

    def _open(self, version: int | None) -> Any:
        """Open the table at a version, or at its last one."""
        with readable(self.folder):
            table = self._database.open_table(TABLE)
            if version is not None:
                table.checkout(version)
        return table

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Raise ValueError unless the block makes the only version since the last one of this run."""
        self._require_version(self._version)
        with writable(self.folder):
            yield
        if self._written.version > self._version + 1:
            self._stop()
        self._version = self._written.version

    def _require_version(self, version: int) -> None:
        with wrap_connection_errors(self.folder):
            self._written.checkout_latest()
        if self._written.version != version:
            self._stop()

    def _stop(self) -> NoReturn:
        self._is_alone = False
        raise ValueError(
            f"another run writes to the index {self.location}, and this one has stopped; nothing that is stored is "
            "lost. When the other has ended, run the same llm2clip index again."
        )

    def _optimize(self) -> None:
        """Join the many small parts, and add new rows to the indexes, until nothing is left to do.

        One call leaves something; a later one would make a version that no manifest names.
        """
        for _ in range(MAX_OPTIMIZE):
            version = self._written.version
            self._written.optimize(cleanup_older_than=NEVER)
            if self._written.version == version:
                return

    def _has_vector_index(self) -> bool:
        return any(VECTOR in index.columns for index in self._written.list_indices())

    def _index_columns(self) -> None:
        have = {name for index in self._written.list_indices() for name in index.columns}
        for name in set(self._written.schema.names) - {*have, *UNINDEXED, KEY}:
            kind = self._written.schema.field(name).type
            has_bitmap = pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
            self._written.create_index(name, config=Bitmap() if has_bitmap and self._has_few_values(name) else BTree())

    def _has_few_values(self, column: str) -> bool:
        values: set[Any] = set()
        for batch in self.keys([column], written=True):
            values |= set(batch[column].unique().to_pylist())
            if len(values) > BITMAP_VALUES:
                return False
        return True

    def _index_vectors(self, manifest: IndexManifest, previous: IndexManifest | None) -> None:
        """Train an IVF index, or keep one that has been trained on most of the rows."""
        rows, index = self._written.count_rows(), manifest.index
        trained = previous.stored.get("trained", 0) if previous else 0
        # The settings of an index that an unfinished run built are not known.
        is_known = previous is not None and previous.stored["version"] == self._first
        same = previous and all(previous.index.get(name) == index[name] for name in ("cells", "precision"))
        if is_known and self._has_vector_index() and same:
            pieces = self._written.index_stats(VECTOR_INDEX).num_indices
            if pieces <= MAX_PIECES and abs(rows - trained) <= GROWTH * trained:
                manifest.stored["trained"] = trained
                return
        logger.info("indexing %d embeddings.", rows)
        options: dict[str, Any] = {"distance_type": "cosine", "num_partitions": index["cells"]}
        is_int8 = index["precision"] == "int8"
        config = IvfSq(**options) if is_int8 else IvfRq(num_bits=RQ_BITS[index["precision"]], **options)
        self._written.create_index(VECTOR, config=config, replace=True)
        manifest.stored["trained"] = rows

    def _write_faiss(self, manifest: IndexManifest) -> None:
        def embeds() -> Iterator[np.ndarray]:
            for batch in self.keys([VECTOR], written=True):
                yield batch[VECTOR].flatten().to_numpy().reshape(-1, manifest.width).astype(np.float32)

        name = f"vectors-{self._written.version}.faiss"
        with local_file(self.folder / name) as file:
            build_faiss(file, embeds, self._written.count_rows(), manifest.width, manifest.index)
        manifest.stored["faiss"] = name

    def _clean(self, manifest: IndexManifest, previous: IndexManifest | None) -> None:
        """Delete versions that no reader can have open any more."""
        kept = {entry.stored.get("faiss") for entry in (manifest, previous) if entry}
        for path in self.folder.glob("vectors-*.faiss"):
            if path.name not in kept:
                path.unlink()
        replaced = 0 if previous is None else previous.stored["version"]
        # However old it is, a reader may have opened it just now.
        made = [each["timestamp"] for each in self._written.list_versions() if each["version"] == replaced]
        ages = [datetime.now().astimezone() - time.astimezone() + CLEANING for time in made]
        self._written.optimize(cleanup_older_than=max([KEPT, *ages]))


def _remove_tree(path: AnyPath) -> None:
    """Delete a folder, if there is one; of a remote one the files, and not the bucket that they may be in."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    if names := path.sizes():
        path.fs.rm([f"{path.path}/{name}" for name in names])
