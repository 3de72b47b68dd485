"""An index in a folder, local or of an object store: a LanceDB table, and a manifest that names its complete version.

A version of the table appears in one step, as one file that names others; so does the manifest, which is written last.
In an object store no lock keeps a second run out: it is noticed by the versions that it adds.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from llm2clip.search.faiss_vectors import build_faiss
from llm2clip.search.index_manifest import REBUILD, IndexManifest
from llm2clip.search.index_rows import KEY, NUMBER, REASON, VECTOR
from llm2clip.search.lance_rows import LanceRows, is_of_lance, unreadable, writing
from llm2clip.utils.files import read_json, remove_unfinished, write_json
from llm2clip.utils.locks import LOCK, OWNER, folder_lock
from llm2clip.utils.manifests import FOLDER_MANIFEST, faults, own_files, stated_files, write_manifest
from llm2clip.utils.remote_path import AnyPath, local_file, open_path, remove_tree, wrap_connection_errors
from llm2clip.utils.shared_files import stored_sha256

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FAILURES = "failures.json"
TABLE = "images"
# The only file that LanceDB writes again: where to look first, in which nothing depends on what is there.
HINT = f"{TABLE}.lance/_versions/latest_version_hint.json"
COMMAND = "index"
# In the schema of the table: the manifest with which a run began.
BEGUN = b"llm2clip"
# Columns that conditions rarely name; the others get an index.
UNINDEXED = {KEY, "caption", "hash", "mtime_ns", "row", "size"}
# Versions stay for readers that have them open, and so do files that no version names.
KEPT = timedelta(days=7)
VECTOR_INDEX = f"{VECTOR}_idx"
# Bits per value of an ivf_rq index.
RQ_BITS = 4
# An index of the embeddings is trained again when it has grown by this share, or is in as many pieces.
GROWTH = 0.2
MAX_PIECES = 8
# Columns with up to as many distinct values get a bitmap index.
BITMAP_VALUES = 1000
DELETE_AT_ONCE = 10_000
MAX_OPTIMIZE = 8


def require_lancedb() -> Any:
    """Import LanceDB, or raise ImportError with the command that installs it."""
    try:
        import lancedb
    except ImportError as error:
        raise ImportError(f"{error}; install it with: pip install 'llm2clip[search]'") from error
    return lancedb


class LanceStore:
    """The index in a folder, local or a URL; see [`IndexStore`]."""

    index_types: tuple[str, ...] = ("flat", "ivf_rq", "faiss")

    def __init__(self, folder: str | Path) -> None:
        self.folder = open_path(folder)
        self.place = str(folder)
        # Whether no other run has been noticed.
        self.is_alone = True

    @property
    def _database(self) -> Any:
        # LanceDB and fsspec have other names for some URLs: each gets the one that was given.
        return require_lancedb().connect(str(self.folder) if isinstance(self.folder, Path) else self.place)

    def require_own(self) -> None:
        with wrap_connection_errors(self.folder):
            if self.folder.is_file():
                raise NotADirectoryError(f"{self.folder} is a file; give the folder of the index: --output-dir FOLDER")
            there = {path.name for path in self.folder.glob("*")}
        if there - {LOCK, OWNER} and own_files(self.folder, COMMAND) is None:
            raise FileExistsError(
                f"{self.folder} is not replaced, because llm2clip {COMMAND} did not write it (no {FOLDER_MANIFEST} "
                "that says so); choose another --output-dir, or delete the folder yourself."
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        # At a URL, another run is noticed when it writes; see `WrittenRows`.
        if not isinstance(self.folder, Path):
            yield
            return
        with folder_lock(self.folder, patience=0):
            remove_unfinished(self.folder)
            yield

    def manifest(self) -> IndexManifest | None:
        path = self.folder / MANIFEST
        try:
            with wrap_connection_errors(path):
                fields = _read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return IndexManifest.from_fields(str(path), fields)

    def require_manifest(self) -> IndexManifest:
        manifest = self.manifest()
        if manifest is None:
            state = "is not finished; run the same llm2clip index again" if self._has_table() else "does not exist"
            raise FileNotFoundError(
                f"there is no index in {self.place} (no {MANIFEST}): it {state}. To create one: llm2clip index FOLDER "
                f"--model MODEL --output-dir {self.place}"
            )
        return manifest

    def failures(self) -> list[dict[str, Any]] | None:
        try:
            return json.loads((self.folder / FAILURES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def rows(self, manifest: IndexManifest) -> LanceRows:
        self._require_unchanged()
        table = self._open(manifest.stored.get("version", 0))
        rows = LanceRows(self.folder, table, manifest)
        try:
            with rows._readable():
                shape = (rows.count(), table.schema.field(VECTOR).type.list_size)
        except (KeyError, AttributeError):  # a flipped bit in the name or the type of a column
            raise ValueError(f"the index {self.place} is damaged: its table has no {VECTOR}s; {REBUILD}") from None
        if shape != (manifest.images, manifest.width):
            raise ValueError(
                f"the index {self.place} is damaged: its manifest lists {manifest.images} {manifest.embed}s of width "
                f"{manifest.width}, but its table has {shape[0]} of width {shape[1]}; {REBUILD}"
            )
        if manifest.index["type"] == "faiss":
            rows._faiss  # noqa: B018  # read now, so that damage is found
        return rows

    def _require_unchanged(self) -> None:
        """Compare rows and vectors with their checksums, each file when it is opened first since it changed."""
        if not isinstance(self.folder, Path):
            return
        with contextlib.suppress(FileNotFoundError):
            for name, listed in stated_files(self.folder).items():
                path = self.folder / name
                # What an update writes and deletes meanwhile is no damage.
                is_stored = name.startswith(f"{TABLE}.lance/") or path.suffix == ".faiss"
                if is_stored and listed.checksum and path.is_file() and stored_sha256(path) != listed.checksum:
                    raise ValueError(f"the index {self.place} is damaged: {name} has changed; {REBUILD}")

    def unfinished(self) -> tuple[IndexManifest, WrittenRows] | None:
        if not self._has_table():
            return None
        try:
            table = self._open(None)
        except ValueError:
            if self.manifest() is not None:
                raise
            logger.warning("what an unfinished run has left in %s cannot be read; it is dropped.", self.place)
            return None
        fields = json.loads((table.schema.metadata or {}).get(BEGUN, b"{}"))
        unfinished = IndexManifest.from_fields(self.place, fields, is_unfinished=True)
        return unfinished, WrittenRows(self, table, unfinished)

    def create(self, manifest: IndexManifest, schema: pa.Schema) -> WrittenRows:
        self._clear_unreadable()
        if own_files(self.folder, COMMAND) is None:
            write_manifest(self.folder, COMMAND)  # from here on the folder is known to be ours
        schema = schema.with_metadata({BEGUN: json.dumps(manifest.as_fields()).encode()})
        # A new version of the table, so that readers of the old ones go on.
        mode = "overwrite" if self._has_table() else "create"
        with writing(self.folder):
            table = self._database.create_table(TABLE, schema=schema, mode=mode)
        return WrittenRows(self, table, manifest)

    def revert(self) -> WrittenRows:
        manifest = self.manifest()
        assert manifest is not None
        table = self._open(manifest.stored["version"])
        with writing(self.folder):
            table.restore()  # as a new version
        manifest.stored["version"] = table.version
        self.list_files(without=(MANIFEST,))
        write_json(self.folder / MANIFEST, manifest.as_fields())
        self.list_files()
        return WrittenRows(self, table, manifest)

    def list_files(self, without: tuple[str, ...] = (), rewritten: tuple[str, ...] = ()) -> None:
        """Bring the files of the index to the disk, and list them with checksums.

        Args:
            without: Files that are about to be replaced, so that the list would be of others.
            rewritten: Files of an earlier list that this run has written. LanceDB writes each of its own once.
        """
        unlisted = {*without, HINT, LOCK, OWNER}
        write_manifest(self.folder, COMMAND, unlisted=unlisted, rewritten={MANIFEST, FAILURES, *rewritten})

    def faults(self) -> Iterator[str]:
        """Yield what differs between the files of the index and their list, in words."""
        # That of an index at a URL, or of its copy, has sizes alone, which may be those before the last change.
        if isinstance(self.folder, Path) and any(listed.checksum for listed in stated_files(self.folder).values()):
            yield from faults(self.folder)

    def remove_empty(self) -> None:
        if not self.is_alone or (self.folder / MANIFEST).is_file():
            return
        found = self.unfinished()
        if found is None or not found[1].count():
            remove_tree(self.folder)

    def _has_table(self) -> bool:
        with wrap_connection_errors(self.folder):
            return (self.folder / f"{TABLE}.lance").is_dir()

    def _clear_unreadable(self) -> None:
        """Delete the files of an index that nobody can read: not finished, of an earlier format, or damaged."""
        with contextlib.suppress(ValueError):
            manifest = self.manifest()
            # First, since LanceDB may panic over a damaged table, or wait for ever.
            if manifest is not None and not any(self.faults()):
                self.rows(manifest)
                self.unfinished()
                return
        for name in own_files(self.folder, COMMAND) or ():
            (self.folder / name).unlink(missing_ok=True)
        remove_tree(self.folder / f"{TABLE}.lance")
        self.list_files()  # the names come again, for other files

    def _open(self, version: int | None) -> Any:
        """Open the table at a version, or at its last one."""
        try:
            table = self._database.open_table(TABLE)
            if version is not None:
                table.checkout(version)
        except Exception as error:
            if not is_of_lance(error):
                raise
            raise unreadable(self.folder, error) from error
        return table


def _read(path: AnyPath) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {REBUILD}") from error


class WrittenRows(LanceRows):
    """The rows that a run writes; see [`UnfinishedRows`]. Each call of `append` and `delete` makes a version.

    Where no lock keeps other runs out, these methods and `publish` raise ValueError if another run has made a version.
    Two that write in the same moment both do so; rows that are then there twice are deleted by the next run.
    """

    def __init__(self, store: LanceStore, table: Any, manifest: IndexManifest) -> None:
        super().__init__(store.folder, table, manifest)
        self.store = store
        self.first_version: int = table.version
        self._version = self.first_version

    @property
    def is_published(self) -> bool:
        manifest = self._previous()
        return manifest is not None and manifest.stored["version"] == self.table.version

    def append(self, rows: pa.Table) -> None:
        schema = self.table.schema.remove_metadata()
        with self._alone():
            self.table.add(rows.select(schema.names).cast(schema))

    def delete(self, numbers: np.ndarray) -> None:
        for start in range(0, len(numbers), DELETE_AT_ONCE):
            some = ",".join(map(str, numbers[start : start + DELETE_AT_ONCE].tolist()))
            with self._alone():
                self.table.delete(f"{NUMBER} IN ({some})")

    def publish(self, manifest: IndexManifest, failures: list[dict[str, Any]]) -> None:
        with writing(self.folder):
            self._publish(manifest, failures)

    def _publish(self, manifest: IndexManifest, failures: list[dict[str, Any]]) -> None:
        self._require_version(self._version)
        previous = self._previous()
        if self.count(f"{REASON} IS NOT NULL"):
            self.table.delete(f"{REASON} IS NOT NULL")
        self._optimize()
        self._index_columns()
        manifest.stored = {}
        if manifest.index["type"] == "ivf_rq":
            self._index_vectors(manifest, previous)
        elif self._has_vector_index():
            self.table.drop_index(VECTOR_INDEX)
        if manifest.index["type"] == "faiss":
            self._write_faiss(manifest)
        self._optimize()
        manifest.stored["version"] = self.table.version
        manifest.record_versions(lancedb=require_lancedb().__version__)
        write_json(self.folder / FAILURES, failures)
        written = tuple(filter(None, [manifest.stored.get("faiss")]))
        self.store.list_files(without=(MANIFEST,), rewritten=written)  # before the manifest names them
        self._require_version(manifest.stored["version"])
        if self.count() != manifest.images:
            self._stop()
        write_json(self.folder / MANIFEST, manifest.as_fields())
        self._clean(manifest, previous)
        self.store.list_files()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Raise ValueError unless the block makes the only version since the last one of this run."""
        self._require_version(self._version)
        with writing(self.folder):
            yield
        if self.table.version > self._version + 1:
            self._stop()
        self._version = self.table.version

    def _require_version(self, version: int) -> None:
        with wrap_connection_errors(self.folder):
            self.table.checkout_latest()
        if self.table.version != version:
            self._stop()

    def _stop(self) -> NoReturn:
        self.store.is_alone = False
        raise ValueError(
            f"another run writes to the index {self.store.place}, and this one has stopped; nothing that is stored is "
            "lost. When the other has ended, run the same llm2clip index again."
        )

    def _previous(self) -> IndexManifest | None:
        """Return the manifest of the index that this one replaces, unless that is damaged."""
        with contextlib.suppress(ValueError):
            return self.store.manifest()
        return None

    def _optimize(self) -> None:
        """Join the many small parts, and add new rows to the indexes, until nothing is left to do.

        One call leaves something; a later one would make a version that no manifest names.
        """
        for _ in range(MAX_OPTIMIZE):
            version = self.table.version
            self.table.optimize()
            if self.table.version == version:
                return

    def _has_vector_index(self) -> bool:
        return any(VECTOR in index.columns for index in self.table.list_indices())

    def _index_columns(self) -> None:
        from lancedb.index import Bitmap, BTree

        have = {name for index in self.table.list_indices() for name in index.columns}
        for name in set(self.columns) - have - UNINDEXED:
            kind = self.table.schema.field(name).type
            has_bitmap = pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
            self.table.create_index(name, config=Bitmap() if has_bitmap and self._has_few_values(name) else BTree())

    def _has_few_values(self, column: str) -> bool:
        values: set[Any] = set()
        for batch in self.scan([column]):
            values |= set(batch[column].unique().to_pylist())
            if len(values) > BITMAP_VALUES:
                return False
        return True

    def _index_vectors(self, manifest: IndexManifest, previous: IndexManifest | None) -> None:
        """Train an IVF index, or keep one that has been trained on most of the rows."""
        from lancedb.index import IvfRq

        rows, cells = self.table.count_rows(), manifest.index["cells"]
        trained = previous.stored.get("trained", 0) if previous else 0
        # Of an index that an unfinished run built, the settings are not known.
        is_known = previous is not None and previous.stored["version"] == self.first_version
        if is_known and self._has_vector_index() and previous and previous.index.get("cells") == cells:
            pieces = self.table.index_stats(VECTOR_INDEX).num_indices
            if pieces <= MAX_PIECES and abs(rows - trained) <= GROWTH * trained:
                manifest.stored["trained"] = trained
                return
        logger.info("indexing %d embeddings.", rows)
        config = IvfRq(distance_type="cosine", num_bits=RQ_BITS, num_partitions=cells)
        self.table.create_index(VECTOR, config=config, replace=True)
        manifest.stored["trained"] = rows

    def _write_faiss(self, manifest: IndexManifest) -> None:
        def embeds() -> Iterator[np.ndarray]:
            for batch in self.scan([VECTOR]):
                yield batch[VECTOR].flatten().to_numpy().reshape(-1, manifest.width).astype(np.float32)

        name = f"vectors-{self.table.version}.faiss"
        with local_file(self.folder / name) as file:
            build_faiss(file, embeds, self.table.count_rows(), manifest.width, manifest.index)
        manifest.stored["faiss"] = name

    def _clean(self, manifest: IndexManifest, previous: IndexManifest | None) -> None:
        """Delete versions that no reader can have open any more."""
        kept = {one.stored.get("faiss") for one in (manifest, previous) if one}
        for path in self.folder.glob("vectors-*.faiss"):
            if path.name not in kept:
                path.unlink()
        self.table.optimize(cleanup_older_than=KEPT)
