"""The command `llm2clip index`: embed images, or the captions of a data set, into a search index, or update one."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm2clip.command_line.settings import refuse, setting
from llm2clip.models.places import DTYPE, ModelDtype, require_model_place
from llm2clip.search.index_settings import IndexSettings

if TYPE_CHECKING:  # which take a minute to import, and mistakes in names are found without
    from llm2clip.search.folder_items import Items

TABLE_SETTINGS = ("metadata_columns", "caption_columns", "image_column", "name", "split", "revision")
# Characters of the name of a table.
MAX_NAME = 48


@dataclass
class IndexConfig(IndexSettings):
    """Settings of `llm2clip index`."""

    folder: str = setting(
        "",
        "Folder of images, searched with its subfolders (links to folders are not followed); or a data set: Hub id, "
        "parquet file, webdataset shards ('shards/*.tar'), a folder of those, or the output of save_to_disk.",
    )
    model: str = setting(
        "",
        "Hub id or folder of an LLM2CLIP model, or for images of its vision half; or another model of images and "
        "texts: one of transformers (openai/clip-vit-base-patch32), open_clip:MODEL/PRETRAINED, or FILE.py:FUNCTION. "
        "Captions may be embedded by a text model of sentence-transformers too.",
    )
    model_revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub.")
    dtype: ModelDtype = setting("auto", DTYPE)
    truncate_dim: int | None = setting(
        None,
        "Number of values that are kept of each embedding, scaled to unit length again; by default all. It suits a "
        "model that was trained with this number among its matryoshka_dims.",
    )
    embed: Literal["image", "caption"] = setting(
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
    caption_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Data set: column of the text shown with a result; with --embed caption: columns of the captions, "
            "texts or lists of texts; a.b is field b of record a. By default caption, txt or text, if any."
        },
    )
    metadata_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Data set: further columns to store, for search --where: strings, numbers, truth values, dates. "
            "An update may have others. An index of a folder has key, folder, extension, size and mtime_ns."
        },
    )
    max_pixels: int = setting(89_478_485, "Largest image to decode, width x height; others are skipped.")
    image_backend: Literal["exact", "fast"] = setting(
        "exact",
        "exact: decode and resize as the image processor does; fast, with an LLM2CLIP model: decode JPEGs to tensors, "
        "with pixel values that differ by up to 2 of 255.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, folder in (("folder", "FOLDER"), ("model", self.folder)):
            if not getattr(self, name):
                raise ValueError(f"the {name} is missing: llm2clip index {folder} --model MODEL")
        self._check_location()
        self._check_captions()

    def _check_captions(self) -> None:
        if self.embed == "image" and len(self.caption_columns) > 1:
            raise ValueError(
                f"caption_columns is {', '.join(self.caption_columns)}, but one text is shown with an image: name one "
                "column, or add --embed caption."
            )
        if self.embed == "caption" and self.kind == "folder":
            raise ValueError(
                "kind is folder, but captions are those of a data set: leave it out. The captions of an image folder "
                "are read from its metadata.jsonl, .csv or .parquet."
            )
        if self.embed == "caption":
            refuse(self, ["image_backend", "num_workers"], "captions are embedded, and no image is decoded")

    def _check_location(self) -> None:
        if self.postgres is None:
            refuse(self, ["table"], "no database is given: add --postgres URL")
        else:
            refuse(self, ["output_dir"], "an index in PostgreSQL (--postgres) has a table")
        if self.postgres is None and "://" not in (self.output_dir or ""):
            refuse(self, ["rows_dir"], "the index is in a folder, which has its embeddings too")
        self.type_of(("flat", "hnsw") if self.postgres is not None else ("flat", "ivf_rq"))


def run(config: IndexConfig) -> dict[str, Any]:
    """Build or update an index; see [`update_index`] for the result.

    Raises:
        ConnectionError: The database or object store cannot be reached.
        FileExistsError: The location of the index contains something else.
        FileNotFoundError: The folder, data set or model does not exist, or there are no images or rows.
        NonFiniteError: The model's embedding of an image or caption is NaN or infinite.
        ValueError: The existing index belongs to another model or source, or no image or caption can be embedded.
    """
    location = _location(config)
    require_model_place(config.model)
    require_data(config.folder)
    from llm2clip.search.location import open_store, rows_folder

    store = open_store(location, config.postgres)
    from llm2clip.encoders.load import load_encoder
    from llm2clip.search.index_update import recorded_name, update_index

    items = _open_items(config, (rows_folder(store, config.rows_dir),))
    options: dict[str, Any] = {"revision": config.model_revision, "truncate_dim": config.truncate_dim}
    options |= {"image_backend": config.image_backend}
    needs = ["image"] if config.embed == "image" else []
    open_encoder = partial(load_encoder, config.model, dtype=config.dtype, needs=needs, **options)
    return update_index(store, items, open_encoder, config, {"model": recorded_name(config.model), **options})


def require_data(path: str) -> None:
    """Raise FileNotFoundError for a path at which there is no data; a Hub id may be one."""
    is_other = "://" in path or glob.has_magic(path) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None
    if not is_other and not Path(path).expanduser().exists():
        raise FileNotFoundError(
            f"there is no file or folder {path} (in {Path.cwd()}), and it is not the id of a data set on the Hub, "
            "which has the form owner/name."
        )


def _location(config: IndexConfig) -> str:
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


def _open_items(config: IndexConfig, exclude: tuple[Path, ...]) -> Items:
    from llm2clip.search.table_items import FolderImages, open_items

    items = open_items(
        config.folder, exclude, config.kind, config.embed, config.max_pixels,
        name=config.name, split=config.split, revision=config.revision, image_column=config.image_column,
        caption_columns=config.caption_columns, metadata_columns=config.metadata_columns,
    )  # fmt: skip
    is_folder = isinstance(items, FolderImages)
    if is_folder:
        refuse(config, TABLE_SETTINGS, f"{config.folder} is a folder of image files (columns: key, folder, size, ...)")
    if not len(items) and not (is_folder and items.failures):
        what = "files" if is_folder else "rows"
        split = "" if is_folder else f" (split {config.split})"
        raise FileNotFoundError(f"there are no {what} in {config.folder}{split}.")
    return items
