"""Building an index and bringing it up to date: only new and changed images are embedded."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from filelock import FileLock, Timeout

from llm2clip.embedding.image_embedder import ImageEmbedder
from llm2clip.search.embedding_store import EMBEDDING, EmbeddingStore, read_part, write_part
from llm2clip.search.image_index import FAILURES, ImageIndex, IndexManifest, read_rows, write_index
from llm2clip.search.image_sets import FolderImages, IndexedImages
from llm2clip.search.vector_index import VectorIndexSettings
from llm2clip.utils.folders import atomic_folder
from llm2clip.utils.processes import worker_count
from llm2clip.utils.settings import setting
from modeling_llm2clip.identity_llm2clip import is_earlier_rule

logger = logging.getLogger(__name__)

MAX_NAMED = 20
PARTS = "part-*.arrow"


@dataclass
class UpdateSettings(VectorIndexSettings):
    """How an index is built and updated."""

    dtype: Literal["float16", "float32"] = setting("float16", "Data type of the stored embeddings.")
    batch_size: int = setting(64, "Images per forward pass.")
    num_workers: int | None = setting(None, "Processes that decode images; by default one per core, at most 8.")
    part_size: int = setting(
        4096, "Images between two saves of an unfinished run; a killed run repeats fewer images than this."
    )
    overwrite: bool = setting(False, "Build an existing index again from scratch.")


def unfinished_folder(folder: Path) -> Path:
    """Return where the parts of an unfinished run of an index are saved."""
    return folder.with_name(f"{folder.name}.unfinished")


def update_index(
    folder: Path, images: IndexedImages, embedder: ImageEmbedder, settings: UpdateSettings
) -> dict[str, Any]:
    """Build an index, or bring an existing one up to date.

    Embeddings are saved in parts, in a folder `FOLDER.unfinished`. If the run is killed, the next one resumes there,
    and its result equals that of an uninterrupted run. The index itself is written or replaced atomically at the end.

    Returns:
        Counts: images `embedded` in this run (including the killed run that it resumes), `kept` from and `removed`
        from the existing index, and `failed`; `images` in the index; and its folder `index`.

    Raises:
        FileExistsError: The folder contains something else than an index.
        NonFiniteError: The model's embedding of an image is NaN or infinite.
        ValueError: The existing index belongs to another model or source, or no image can be embedded.
    """
    unfinished = unfinished_folder(folder)
    unfinished.mkdir(parents=True, exist_ok=True)
    lock = FileLock(unfinished / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process is updating the index {folder}; wait until it has finished.") from None
    with lock:
        try:
            return _Update(folder, images, embedder, settings).run()
        finally:
            # The next run resumes from the parts, if there are any.
            if not any(unfinished.glob(PARTS)):
                shutil.rmtree(unfinished)


class _Update:
    """One run: the embeddings that exist, those that are missing, and the index of both."""

    def __init__(self, folder: Path, images: IndexedImages, embedder: ImageEmbedder, settings: UpdateSettings) -> None:
        self.folder = folder
        self.images = images
        self.embedder = embedder
        self.settings = settings
        self.fingerprint = embedder.fingerprint()
        self.manifest = IndexManifest(
            model=embedder.name,
            revision=embedder.revision,
            vision_fingerprint=self.fingerprint,
            width=embedder.width,
            dtype=settings.dtype,
            source=images.source,
            index=settings.of_type(),
            image_backend=embedder.transform.backend,
            max_pixels=images.max_pixels,
        )
        self.unfinished = unfinished_folder(folder)
        self.store = EmbeddingStore(images.identity)
        self.previous: pa.Table | None = None
        self.previous_identities: list[Any] = []
        self.new: set[Hashable] = set()

    def run(self) -> dict[str, Any]:
        self._read_previous()
        self._read_parts()
        identities = self.images.identities()
        self._embed(identities)
        failures = [{"key": key, "reason": reason} for key, reason in self.images.failures.items()]
        rows = []
        for row, identity in enumerate(identities):
            if identity in self.store:
                rows.append(row)
            else:
                failures.append({"key": self.images.keys[row], "reason": self.store.failures[identity]})
        self._report(failures)
        if not rows:
            self._delete_parts()
            source = self.manifest.source["path"]
            raise ValueError(f"none of the {len(failures)} files or rows of {source} can be embedded.")
        self.manifest.images, self.manifest.failed = len(rows), len(failures)
        self._write(rows, identities, failures)
        self._delete_parts()
        embedded = sum(identities[row] in self.new for row in rows)
        return {
            "embedded": embedded,
            "kept": len(rows) - embedded,
            "removed": self._count_removed(identities),
            "failed": len(failures),
            "images": len(rows),
            "index": str(self.folder),
        }

    def _read_previous(self) -> None:
        if self.settings.overwrite or not self.folder.exists() or not any(self.folder.iterdir()):
            return
        self._require_same(self.folder)
        self.previous = read_rows(self.folder).data.table
        self.previous_identities = self.store.add(self.previous)

    def _read_parts(self) -> None:
        if self.settings.overwrite:
            self._delete_parts()
        parts = sorted(self.unfinished.glob(PARTS))
        if parts:
            self._require_same(self.unfinished)
            for part in parts:
                self.new |= set(self.store.add(read_part(part)))
            logger.info("resuming an unfinished run, which has embedded %d images.", len(self.new))
        self.manifest.write(self.unfinished)

    def _delete_parts(self) -> None:
        for part in self.unfinished.glob(PARTS):
            part.unlink()

    def _require_same(self, folder: Path) -> None:
        """Raise ValueError if the model, the source, the data type or the decoding differs from that of an index."""
        manifest = IndexManifest.read(folder)
        manifest.require_model(folder, self.embedder, self.fingerprint)
        if is_earlier_rule(manifest.vision_fingerprint):
            # Of the embeddings that are kept, no more is known than before.
            self.manifest.vision_fingerprint = manifest.vision_fingerprint
        for name in ("source", "dtype", "image_backend"):
            there, here = getattr(manifest, name), getattr(self.manifest, name)
            if there != here:
                raise ValueError(
                    f"the index {folder} was built with {name} {_printable(there)}, not {_printable(here)}; choose "
                    "another --output-dir, or add --overwrite to build it again."
                )

    def _embed(self, identities: list[Hashable]) -> None:
        """Embed each distinct image once, unless its embedding exists or it is known to fail."""
        first = {identity: row for row, identity in reversed(list(enumerate(identities)))}
        known = self.store.failures
        todo = sorted(row for identity, row in first.items() if identity not in self.store and identity not in known)
        if not todo:
            return
        batch = self.settings.batch_size
        # Parts of whole batches: a resumed run then forms the same batches as an uninterrupted one.
        part_size = max(1, self.settings.part_size // batch) * batch
        workers = worker_count(self.settings.num_workers)
        # A broken model is not a damaged image: all of its embeddings are in doubt.
        options: dict[str, Any] = {"part_size": part_size, "on_not_finite": "raise"}
        parts = self.embedder.embed_rows(self.images, todo, batch, min(workers, len(todo)), **options)
        for number, part in enumerate(parts, len(list(self.unfinished.glob(PARTS)))):
            path = self.unfinished / f"part-{number:06d}.arrow"
            columns = self.images.columns(part.rows).select(list(self.images.identity))
            write_part(path, columns, part.embeds.astype(self.settings.dtype), part.reasons)
            self.new |= set(self.store.add(read_part(path)))

    def _write(self, rows: list[int], identities: list[Hashable], failures: list[dict[str, Any]]) -> None:
        described = self.images.columns(rows)
        if self._is_current(described, failures):
            return
        embeds = self.store.gather([identities[row] for row in rows])
        # Frees memory for faiss, which copies the embeddings.
        del self.store, self.previous
        with atomic_folder(self.folder, "index", overwrite=True) as folder:
            write_index(folder, self.manifest, self.settings, described, embeds, failures)

    def _is_current(self, described: pa.Table, failures: list[dict[str, Any]]) -> bool:
        """Return whether the existing index is undamaged and has the same content."""
        if self.previous is None or not self.previous.drop_columns([EMBEDDING]).equals(described):
            return False
        try:
            there = asdict(ImageIndex.open(self.folder).manifest) | {"versions": None}
            written_failures = json.loads((self.folder / FAILURES).read_text(encoding="utf-8"))
        except (ValueError, OSError):
            logger.info("%s is damaged; it is written again.", self.folder)
            return False
        return there == asdict(self.manifest) | {"versions": None} and written_failures == failures

    def _count_removed(self, identities: list[Hashable]) -> int:
        """Count images of the previous index that no longer exist: paths of a folder, content of a data set."""
        present, before = set(identities), self.previous_identities
        if isinstance(self.images, FolderImages):
            present, before = {*self.images.keys, *self.images.failures}, [key for key, *_ in before]
        return sum(one not in present for one in before)

    def _report(self, failures: list[dict[str, Any]]) -> None:
        if failures:
            logger.warning("skipped:")
        for failure in failures[:MAX_NAMED]:
            logger.warning("  %s: %s", failure["key"], failure["reason"])
        if len(failures) > MAX_NAMED:
            logger.warning("  and %d more, in %s", len(failures) - MAX_NAMED, self.folder / FAILURES)


def _printable(value: Any) -> str:
    return ", ".join(f"{key} {entry}" for key, entry in value.items() if entry) if isinstance(value, dict) else value
