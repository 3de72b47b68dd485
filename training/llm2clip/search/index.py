"""The command `llm2clip index`: embed the images of a folder or data set into a search index, or update one."""

from __future__ import annotations

import glob
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm2clip.data import DEFAULT_MAX_PIXELS, ImageBackend
from llm2clip.embedding.image_embedder import ImageEmbedder
from llm2clip.search.faiss_vectors import require_faiss
from llm2clip.search.folder_images import FolderImages
from llm2clip.search.image_sets import IndexedImages
from llm2clip.search.index_update import UpdateSettings, update_index
from llm2clip.search.lance_store import LanceStore, require_lancedb
from llm2clip.search.table_images import TableImages, is_dataset
from llm2clip.utils.settings import setting


@dataclass
class IndexConfig(UpdateSettings):
    """Settings of `llm2clip index`."""

    folder: str = setting(
        "",
        "Folder of images, searched with its subfolders (links to folders are not followed); or a data set: Hub id, "
        "parquet file, webdataset shards ('shards/*.tar'), a folder of those, or the output of save_to_disk.",
    )
    model: str = setting("", "Hub id or folder of an LLM2CLIP model or of its vision half.")
    model_revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub.")
    output_dir: str | None = setting(
        None, "Folder of the index on this machine; by default runs/index/NAME_OF_THE_IMAGE_FOLDER."
    )
    kind: Literal["auto", "folder", "dataset"] = setting(
        "auto", "Whether FOLDER is a folder of image files or a data set; auto detects it."
    )
    name: str | None = setting(None, "Data set: configuration, if it has several.")
    split: str = setting("train", "Data set: split.")
    revision: str | None = setting(None, "Data set: branch, tag or commit on the Hub.")
    image_column: str | None = setting(
        None, "Data set: column of the images; by default image, or jpg, png, ... of webdataset shards."
    )
    caption_column: str | None = setting(
        None, "Data set: column of the text shown with a result; by default caption, txt or text, if any."
    )
    metadata_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Data set: further columns to store, for search --where: strings, numbers, truth values, dates. "
            "An index of a folder has the columns key, folder, extension, size and mtime_ns."
        },
    )
    max_pixels: int = setting(DEFAULT_MAX_PIXELS, "Largest image to decode, width x height; others are skipped.")
    image_backend: ImageBackend = setting(
        "exact",
        "exact: decode and resize as the image processor does; fast: decode JPEGs to tensors, with pixel values that "
        "differ by up to 2 of 255.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, folder in (("folder", "FOLDER"), ("model", self.folder)):
            if not getattr(self, name):
                raise ValueError(f"the {name} is missing: llm2clip index {folder} --model MODEL")


def run(config: IndexConfig) -> dict[str, Any]:
    """Build or update an index; see [`update_index`] for the result.

    Raises:
        FileNotFoundError: The folder, data set or model does not exist, or there are no images.
        NonFiniteError: The model's embedding of an image is NaN or infinite.
        ValueError: The existing index belongs to another model or source, or no image can be embedded.
    """
    # Before a large model is loaded.
    require_lancedb()
    if config.index_type == "faiss":
        require_faiss()
    store = LanceStore(_output(config))
    store.require_own()
    images = _open_images(config, (store.folder,))
    embedder = ImageEmbedder.load(config.model, config.model_revision, config.image_backend)
    return update_index(store, images, embedder, config)


def _output(config: IndexConfig) -> Path:
    name = Path(config.folder).resolve().name
    if config.output_dir is None and (not name or glob.has_magic(name)):
        raise ValueError(f"the index of {config.folder} needs a folder: add --output-dir FOLDER")
    if config.output_dir and "://" in config.output_dir:
        raise ValueError(f"output_dir is {config.output_dir}, but an index is a folder on this machine.")
    return Path(config.output_dir or f"runs/index/{name}")


def _open_images(config: IndexConfig, exclude: tuple[Path, ...]) -> IndexedImages:
    if config.kind == "folder" or (config.kind == "auto" and not is_dataset(config.folder)):
        if config.metadata_columns:
            raise ValueError(
                f"metadata_columns is {', '.join(config.metadata_columns)}, but {config.folder} is a folder of image "
                "files, whose index has the columns key, folder, extension, size and mtime_ns."
            )
        folder = FolderImages(config.folder, exclude, config.max_pixels)
        if not len(folder) and not folder.failures:
            raise FileNotFoundError(f"there are no files in {config.folder}.")
        return folder
    table = TableImages(
        config.folder, config.name, config.split, config.revision, config.image_column, config.caption_column,
        config.metadata_columns, config.max_pixels,
    )  # fmt: skip
    if not len(table):
        raise FileNotFoundError(f"there are no rows in {config.folder} (split {config.split}).")
    return table
