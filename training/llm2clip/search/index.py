"""`llm2clip index`: the images of a folder or a data set as embeddings with a faiss index; again, what has changed."""

from __future__ import annotations

import glob
import json
import logging
import shutil
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch
from filelock import FileLock, Timeout

from llm2clip.data import DEFAULT_MAX_PIXELS, IMAGE_BACKENDS, ImageBackend
from llm2clip.embedding.image_embedder import ImageEmbedder
from llm2clip.search.image_index import FAILURES, VECTORS, ImageIndex, IndexManifest, read_rows, write_index
from llm2clip.search.image_sets import FolderImages, TableImages, is_dataset
from llm2clip.search.store import EMBEDDING, EmbeddingStore, read_part, write_part
from llm2clip.search.vectors import VectorIndexSettings, require_faiss
from llm2clip.utils.files import atomic_folder, refuse_existing

logger = logging.getLogger(__name__)

KINDS = ("auto", "folder", "dataset")
DTYPES = ("float16", "float32")
MAX_NAMED = 20
PARTS = "part-*.arrow"
# What shows that a folder is an index. Not its manifest alone: a caption cache has one of the same name.
MARKS = (VECTORS, FAILURES)


@dataclass
class IndexConfig(VectorIndexSettings):
    """Settings of `llm2clip index`."""

    folder: str = field(
        default="",
        metadata={
            "help": "Folder of images, with its subfolders (not with those that are links); or data: Hub id of a data "
            "set, parquet file, webdataset shards ('shards/*.tar'), a folder of those or one written by save_to_disk."
        },
    )
    model: str = field(default="", metadata={"help": "Folder or Hub id of an LLM2CLIP model or of its vision half."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model."})
    output_dir: str | None = field(
        default=None, metadata={"help": "The index; unset: runs/index and the name of the images' folder."}
    )
    kind: str = field(
        default="auto", metadata={"help": "What FOLDER is: folder (of image files), dataset, or auto: look at it."}
    )
    name: str | None = field(default=None, metadata={"help": "data set: its configuration."})
    split: str = field(default="train", metadata={"help": "data set: its split."})
    revision: str | None = field(default=None, metadata={"help": "data set: its revision."})
    image_column: str | None = field(
        default=None, metadata={"help": "data set: column of the images; unset: image, or jpg, png, ... of shards."}
    )
    caption_column: str | None = field(
        default=None,
        metadata={"help": "data set: text shown with a result; unset: caption, txt or text where there is one."},
    )
    dtype: str = field(default="float16", metadata={"help": "Of the stored embeddings: float16 or float32."})
    batch_size: int = field(default=64, metadata={"help": "Images per forward pass."})
    num_workers: int | None = field(
        default=None, metadata={"help": "Processes that read and decode images; unset: one per core, at most 8."}
    )
    part_size: int = field(
        default=4096, metadata={"help": "Images after which they are on disk, where a killed run goes on."}
    )
    max_pixels: int = field(default=DEFAULT_MAX_PIXELS, metadata={"help": "Largest image that is decoded."})
    image_backend: str = field(
        default="exact",
        metadata={"help": "exact: as the image processor; fast: JPEGs as tensors, up to 2 grey levels off."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Begin anew where there is an index."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting, example in (("folder", "FOLDER --model MODEL"), ("model", f"{self.folder} --model MODEL")):
            if not getattr(self, setting):
                raise ValueError(f"give a {setting}: llm2clip index {example}")
        for setting, choices in (("kind", KINDS), ("dtype", DTYPES), ("image_backend", IMAGE_BACKENDS)):
            value = getattr(self, setting)
            if value not in choices:
                raise ValueError(f"{setting} {value!r} is unknown; choose one of {', '.join(choices)}.")
        for setting in ("batch_size", "part_size", "max_pixels"):
            if getattr(self, setting) < 1:
                raise ValueError(f"{setting} must be at least 1, not {getattr(self, setting)}.")


Images = FolderImages | TableImages


def run(config: IndexConfig) -> dict[str, Any]:
    """Make an index, or bring it up to date.

    Embeddings come to disk in parts, in a folder `OUTPUT_DIR.unfinished` that a killed run leaves and the next run
    goes on from; the result equals that of an unbroken run. An index appears, or is replaced, when all is done.

    Returns:
        Counts: `embedded` in this run (or in the killed one before it), `kept` from the index that there was,
        `removed` from it, `failed`; `images` in the index; and where it is.

    Raises:
        FileNotFoundError: There are no images, or no such folder, data or model.
        ValueError: The index there is another model's or another folder's, or not one image can be read.
    """
    require_faiss()
    output = _output(config)
    unfinished = output.with_name(f"{output.name}.unfinished")
    images = _open_images(config, (output, unfinished))
    embedder = ImageEmbedder.load(config.model, config.model_revision, cast(ImageBackend, config.image_backend))
    manifest = IndexManifest(
        model=embedder.name,
        revision=config.model_revision,
        vision_fingerprint=embedder.fingerprint(),
        width=embedder.width,
        dtype=config.dtype,
        source=images.describe(),
        index=config.of_type(),
        image_backend=config.image_backend,
        max_pixels=config.max_pixels,
    )
    unfinished.mkdir(parents=True, exist_ok=True)
    lock = FileLock(unfinished / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another llm2clip index is at work on {output}; wait for it.") from None
    with lock:
        try:
            return _Update(config, images, embedder, manifest, output, unfinished).run()
        finally:
            # With parts in it, the next run goes on from there.
            if not any(unfinished.glob(PARTS)):
                shutil.rmtree(unfinished)


def _output(config: IndexConfig) -> Path:
    """The folder of the index, which may hold an index but nothing else."""
    name = Path(config.folder).resolve().name
    if config.output_dir is None and (not name or glob.has_magic(name)):
        raise ValueError(f"say where the index of {config.folder} is to be: --output-dir FOLDER")
    output = Path(config.output_dir or f"runs/index/{name}")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; give a folder for the index: --output-dir FOLDER")
    refuse_existing(output, overwrite=True, marks=MARKS)
    return output


def _open_images(config: IndexConfig, own_folders: tuple[Path, ...]) -> Images:
    as_dataset = is_dataset(config.folder) if config.kind == "auto" else config.kind == "dataset"
    if not as_dataset:
        folder = FolderImages(config.folder, own_folders, config.max_pixels)
        if not folder.keys and not folder.failures:
            raise FileNotFoundError(f"there are no files in {config.folder}.")
        return folder
    table = TableImages(
        config.folder,
        config.name,
        config.split,
        config.revision,
        config.image_column,
        config.caption_column,
        config.max_pixels,
    )
    if not table.keys:
        raise FileNotFoundError(f"there are no rows in {config.folder} (split {config.split}).")
    return table


class _Update:
    """One run: what is known, what is new, and the index of both."""

    def __init__(
        self,
        config: IndexConfig,
        images: Images,
        embedder: ImageEmbedder,
        manifest: IndexManifest,
        output: Path,
        unfinished: Path,
    ) -> None:
        self.config = config
        self.images = images
        self.embedder = embedder
        self.manifest = manifest
        self.output = output
        self.unfinished = unfinished
        self.known = EmbeddingStore(images.identity)
        self.previous: pa.Table | None = None
        self.before: list[Hashable] = []
        self.new: set[Hashable] = set()

    def run(self) -> dict[str, Any]:
        self._read_previous()
        self._read_parts()
        identities = self.images.identities()
        self._embed(identities)
        failures = [{"key": key, "reason": reason} for key, reason in self.images.failures.items()]
        rows = []
        for row, identity in enumerate(identities):
            if identity in self.known:
                rows.append(row)
            else:
                failures.append({"key": self.images.keys[row], "reason": self.known.failures[identity]})
        self._report(failures)
        if not rows:
            self._drop_parts()
            raise ValueError(f"not one of the {len(failures)} files or rows of {self.config.folder} can be embedded.")
        self.manifest.images, self.manifest.failed = len(rows), len(failures)
        removed = self._removed(identities)
        self._write(rows, identities, failures)
        self._drop_parts()
        embedded = sum(identities[row] in self.new for row in rows)
        return {
            "embedded": embedded,
            "kept": len(rows) - embedded,
            "removed": removed,
            "failed": len(failures),
            "images": len(rows),
            "index": str(self.output),
        }

    def _read_previous(self) -> None:
        if self.config.overwrite or not self.output.exists() or not any(self.output.iterdir()):
            return
        self._require_same(IndexManifest.read(self.output), self.output)
        self.previous = read_rows(self.output).data.table
        self.before = self.known.add(self.previous)

    def _read_parts(self) -> None:
        if self.config.overwrite:
            self._drop_parts()
        parts = sorted(self.unfinished.glob(PARTS))
        if parts:
            self._require_same(IndexManifest.read(self.unfinished), self.unfinished)
            for part in parts:
                self.new |= set(self.known.add(read_part(part)))
            logger.info("going on from an unfinished run: %d of its images are done.", len(self.new))
        self.manifest.write(self.unfinished)

    def _drop_parts(self) -> None:
        for part in self.unfinished.glob(PARTS):
            part.unlink()

    def _require_same(self, manifest: IndexManifest, folder: Path) -> None:
        """Refuse to mix models, images of two places, precisions, or ways to decode."""
        manifest.require_model(folder, self.embedder.name, self.manifest.vision_fingerprint, self.manifest.width)
        for what in ("source", "dtype", "image_backend"):
            there, here = getattr(manifest, what), getattr(self.manifest, what)
            if there != here:
                raise ValueError(
                    f"{folder} is the index of {what} {_shown(there)}, not of {_shown(here)}; choose another "
                    "--output-dir, or add --overwrite to begin anew."
                )

    def _embed(self, identities: list[Hashable]) -> None:
        """Embed what is neither known nor known to fail, each distinct image once."""
        first = {identity: row for row, identity in reversed(list(enumerate(identities)))}
        todo = sorted(
            row
            for identity, row in first.items()
            if identity not in self.known and identity not in self.known.failures
        )
        if not todo:
            return
        batch = self.config.batch_size
        # Whole batches, so that those of a run that goes on are cut as those of an unbroken one.
        part_size = max(1, self.config.part_size // batch) * batch
        workers = min(8, torch.get_num_threads()) if self.config.num_workers is None else self.config.num_workers
        parts = self.embedder.embed_rows(self.images, todo, batch, min(workers, len(todo)), part_size)
        for number, part in enumerate(parts, len(list(self.unfinished.glob(PARTS)))):
            path = self.unfinished / f"part-{number:06d}.arrow"
            columns = self.images.columns(part.rows).select(list(self.images.identity))
            write_part(path, columns, part.embeds.astype(self.config.dtype), part.reasons)
            self.new |= set(self.known.add(read_part(path)))

    def _write(self, rows: list[int], identities: list[Hashable], failures: list[dict[str, Any]]) -> None:
        described = self.images.columns(rows)
        if self._is_written(described, failures):
            return
        embeds = self.known.gather([identities[row] for row in rows])
        # faiss is about to need the memory.
        self.known.close()
        self.previous = None
        with atomic_folder(self.output, overwrite=True, marks=MARKS) as folder:
            write_index(folder, self.manifest, self.config, described, embeds, failures)

    def _is_written(self, described: pa.Table, failures: list[dict[str, Any]]) -> bool:
        """Whether the index there is says all that already, and is whole."""
        if self.previous is None or not self.previous.drop_columns([EMBEDDING]).equals(described):
            return False
        try:
            there = asdict(ImageIndex.open(self.output).manifest) | {"versions": None}
            written_failures = json.loads((self.output / FAILURES).read_text(encoding="utf-8"))
        except (ValueError, OSError):
            logger.info("%s is damaged; it is written anew.", self.output)
            return False
        return there == asdict(self.manifest) | {"versions": None} and written_failures == failures

    def _removed(self, identities: list[Hashable]) -> int:
        """Images of the previous index that are no longer there; of a folder, paths."""
        if self.previous is None:
            return 0
        if isinstance(self.images, FolderImages):
            present: set[Any] = set(self.images.keys) | set(self.images.failures)
            return sum(key not in present for key in self.previous.column("key").to_pylist())
        present = set(identities)
        return sum(identity not in present for identity in self.before)

    def _report(self, failures: list[dict[str, Any]]) -> None:
        if not failures:
            return
        logger.warning("left out:")
        for failure in failures[:MAX_NAMED]:
            logger.warning("  %s: %s", failure["key"], failure["reason"])
        if len(failures) > MAX_NAMED:
            logger.warning("  and %d more, in %s", len(failures) - MAX_NAMED, self.output / FAILURES)


def _shown(value: Any) -> str:
    return ", ".join(f"{key} {entry}" for key, entry in value.items() if entry) if isinstance(value, dict) else value


__all__ = ["IndexConfig", "run"]
