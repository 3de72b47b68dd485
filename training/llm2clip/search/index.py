"""The command `llm2clip index`: embed the images of a folder or data set into a search index, or update one."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm2clip.data import DEFAULT_MAX_PIXELS, ImageBackend
from llm2clip.embedding.image_embedder import ImageEmbedder
from llm2clip.search.image_sets import FolderImages, IndexedImages, TableImages, is_dataset
from llm2clip.search.index_update import UpdateSettings, unfinished_folder, update_index
from llm2clip.search.vector_index import require_faiss
from llm2clip.utils.folders import refuse_existing
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
    output_dir: str | None = setting(None, "Folder of the index; by default runs/index/NAME_OF_THE_IMAGE_FOLDER.")
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
    require_faiss()  # before a large model is loaded
    output = _output(config)
    images = _open_images(config, (output, unfinished_folder(output)))
    embedder = ImageEmbedder.load(config.model, config.model_revision, config.image_backend)
    return update_index(output, images, embedder, config)


def _output(config: IndexConfig) -> Path:
    """Return the folder of the index, after checking that nothing else is in it."""
    name = Path(config.folder).resolve().name
    if config.output_dir is None and (not name or glob.has_magic(name)):
        raise ValueError(f"the index of {config.folder} needs a folder: add --output-dir FOLDER")
    output = Path(config.output_dir or f"runs/index/{name}")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; give the folder of the index: --output-dir FOLDER")
    refuse_existing(output, "index", overwrite=True)
    return output


def _open_images(config: IndexConfig, exclude: tuple[Path, ...]) -> IndexedImages:
    if config.kind == "folder" or (config.kind == "auto" and not is_dataset(config.folder)):
        folder = FolderImages(config.folder, exclude, config.max_pixels)
        if not folder.keys and not folder.failures:
            raise FileNotFoundError(f"there are no files in {config.folder}.")
        return folder
    table = TableImages(
        config.folder, config.name, config.split, config.revision, config.image_column, config.caption_column,
        config.max_pixels,
    )  # fmt: skip
    if not table.keys:
        raise FileNotFoundError(f"there are no rows in {config.folder} (split {config.split}).")
    return table
