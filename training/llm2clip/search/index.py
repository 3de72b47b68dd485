"""The command `llm2clip index`: embed images, or the captions of a data set, into a search index, or update one."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm2clip.data import DEFAULT_MAX_PIXELS, ImageBackend
from llm2clip.encoders.ours import OurEncoder
from llm2clip.search.faiss_vectors import require_faiss
from llm2clip.search.folder_images import FolderImages
from llm2clip.search.image_sets import IndexedItems
from llm2clip.search.index_manifest import Embed
from llm2clip.search.index_update import UpdateSettings, update_index
from llm2clip.search.lance_store import require_lancedb
from llm2clip.search.stores import open_store
from llm2clip.search.table_captions import TableCaptions
from llm2clip.search.table_images import TableImages, is_dataset
from llm2clip.utils.settings import setting

# Characters of the name of a table.
MAX_NAME = 48

WHOLE_MODEL = "Captions are embedded by the whole model with its LLM."


@dataclass
class IndexConfig(UpdateSettings):
    """Settings of `llm2clip index`."""

    folder: str = setting(
        "",
        "Folder of images, searched with its subfolders (links to folders are not followed); or a data set: Hub id, "
        "parquet file, webdataset shards ('shards/*.tar'), a folder of those, or the output of save_to_disk.",
    )
    model: str = setting(
        "", "Hub id or folder of an LLM2CLIP model, or for images of its vision half; captions need the whole model."
    )
    model_revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub.")
    embed: Embed = setting(
        "image",
        "What a search finds: images by their embeddings; or caption: the captions of a data set by theirs, a row for "
        "each caption. Both are searched with texts and with images.",
    )
    output_dir: str | None = setting(
        None,
        "Folder of the index, or its URL in an object store: s3://BUCKET/INDEX, gs:// or az:// (needs s3fs, gcsfs or "
        "adlfs); by default runs/index/NAME_OF_THE_IMAGE_FOLDER, of captions runs/index/NAME_captions.",
    )
    postgres: str | None = field(
        default=None,
        repr=False,  # it may have a password in it
        metadata={
            "help": "Write the index into this PostgreSQL database with pgvector instead of a folder: "
            "postgresql://USER@HOST:5432/DATABASE. Leave the password to ~/.pgpass or PGPASSWORD, since other users "
            "of the machine see the arguments of a command."
        },
    )
    table: str | None = setting(
        None,
        "With --postgres: the table of the index, NAME or SCHEMA.NAME; by default the name of the image folder, of "
        "captions NAME_captions, in the schema llm2clip. NAME_llm2clip, beside it, has the description of the index.",
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
    caption_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "With --embed caption: columns of the captions, texts or lists of texts; a.b is field b of record "
            "a. By default caption_column."
        },
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
        self._check_place()
        self._check_captions()

    def _check_captions(self) -> None:
        if self.embed == "image" and self.caption_columns:
            raise ValueError(
                f"caption_columns is {', '.join(self.caption_columns)}, but images are embedded: add --embed caption, "
                "or name one column that is shown with them by --caption-column."
            )
        if self.embed == "caption" and self.kind == "folder":
            raise ValueError(
                "kind is folder, but captions are those of a data set: leave it out. The captions of an image folder "
                "are read from its metadata.jsonl, .csv or .parquet."
            )
        if self.embed == "caption" and self.image_backend != "exact":
            raise ValueError(f"image_backend is {self.image_backend}, but captions are embedded: leave it out.")
        if self.caption_column and self.caption_columns:
            raise ValueError("caption_column and caption_columns are both given: leave out caption_column.")

    def _check_place(self) -> None:
        if self.postgres is None and self.table is not None:
            raise ValueError(f"table is {self.table}, but no database is given: add --postgres URL")
        if self.postgres is not None and self.output_dir is not None:
            raise ValueError(
                f"output_dir is {self.output_dir}, but an index in PostgreSQL has a table instead: leave it out, or "
                "leave out --postgres."
            )
        types = ("flat", "hnsw") if self.postgres is not None else ("flat", "ivf_rq", "faiss")
        if self.index_type not in ("auto", *types):
            place = "PostgreSQL" if self.postgres is not None else "a folder"
            raise ValueError(
                f"index_type is {self.index_type}, but an index in {place} has one of auto, {', '.join(types)}."
            )


def run(config: IndexConfig) -> dict[str, Any]:
    """Build or update an index; see [`update_index`] for the result.

    Raises:
        ConnectionError: The database or object store cannot be reached.
        FileExistsError: The place of the index contains something else.
        FileNotFoundError: The folder, data set or model does not exist, or there are no images or rows.
        NonFiniteError: The model's embedding of an image or caption is NaN or infinite.
        ValueError: The existing index belongs to another model or source, or no image or caption can be embedded.
    """
    place = _place(config)
    store = open_store(place, config.postgres)
    # Before a large model is loaded.
    if config.postgres is None:
        require_lancedb()
    if config.index_type == "faiss":
        require_faiss()
    store.require_own()
    is_folder = config.postgres is None and "://" not in place
    items = _open_items(config, (Path(place),) if is_folder else ())
    if config.embed == "caption":
        encoder = OurEncoder.load(config.model, config.model_revision, ["image", "text"], hint=WHOLE_MODEL)
    else:
        encoder = OurEncoder.load(config.model, config.model_revision, ["image"], image_backend=config.image_backend)
    return update_index(store, items, encoder, config)


def _place(config: IndexConfig) -> str:
    """Return the folder or the table of the index."""
    in_database = config.postgres is not None
    given = config.table if in_database else config.output_dir
    if given is not None:
        return given
    name = Path(config.folder).resolve().name
    if not name or glob.has_magic(name):
        needs = "table: add --table NAME" if in_database else "folder: add --output-dir FOLDER"
        raise ValueError(f"the index of {config.folder} needs a {needs}")
    suffix = "_captions" if config.embed == "caption" else ""
    if not in_database:
        return f"runs/index/{name}{suffix}"
    return re.sub(r"^(?=\d)|[^a-z0-9_]+", "_", name.lower())[: MAX_NAME - len(suffix)] + suffix


def _open_items(config: IndexConfig, exclude: tuple[Path, ...]) -> IndexedItems:
    is_folder = config.kind == "folder" or (config.kind == "auto" and not is_dataset(config.folder))
    if is_folder and config.embed == "image":
        if config.metadata_columns:
            raise ValueError(
                f"metadata_columns is {', '.join(config.metadata_columns)}, but {config.folder} is a folder of image "
                "files, whose index has the columns key, folder, extension, size and mtime_ns."
            )
        folder = FolderImages(config.folder, exclude, config.max_pixels)
        if not len(folder) and not folder.failures:
            raise FileNotFoundError(f"there are no files in {config.folder}.")
        return folder
    where = config.folder, config.name, config.split, config.revision, config.image_column
    table: TableImages | TableCaptions
    if config.embed == "caption":
        captions = config.caption_columns or ([config.caption_column] if config.caption_column else [])
        table = TableCaptions(*where, captions, config.metadata_columns, config.max_pixels)
    else:
        table = TableImages(*where, config.caption_column, config.metadata_columns, config.max_pixels)
    if not len(table):
        raise FileNotFoundError(f"there are no rows in {config.folder} (split {config.split}).")
    return table
