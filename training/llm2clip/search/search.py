"""The command `llm2clip search`: find the images or captions of an index that match a text or an image."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from llm2clip.data import decode_image
from llm2clip.encoders.ours import OurEncoder
from llm2clip.search.image_index import ImageIndex
from llm2clip.search.page import write_page
from llm2clip.search.results import QueryResults, ResultImages, SearchResult
from llm2clip.utils.logs import printable
from llm2clip.utils.settings import setting

logger = logging.getLogger(__name__)


@dataclass
class SearchConfig:
    """Settings of `llm2clip search`."""

    index: str = setting("", "Folder or URL of an index, written by llm2clip index; with --postgres, its table.")
    query: list[str] = field(
        default_factory=list,
        metadata={"help": "Texts to search for, each in quotes; all are searched with one start."},
    )
    image: str | None = setting(
        None, "Image file to search for similar images, or for captions that fit it; this needs no LLM."
    )
    where: str | None = setting(
        None,
        "Only rows that fulfil this condition in SQL on columns of the index, such as \"source = 'noto'\"; an index "
        "of a folder has key, folder, extension, size and mtime_ns, one of a data set key, row, hash, caption and its "
        "metadata_columns, and one of captions caption_column and caption_number too.",
    )
    top: int = setting(10, "Number of images or captions shown per query.")
    model: str | None = setting(None, "Hub id or folder of the model; by default the model that made the index.")
    model_revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub.")
    json: bool = setting(False, "Print JSON instead of tables.")
    postgres: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "URL of the PostgreSQL database that the index is in, as for llm2clip index."},
    )
    html: str | None = setting(None, "Also write the results to this self-contained HTML file, with thumbnails.")
    picture: str | None = setting(None, "Also draw the thumbnails of each query into this PNG file.")

    def __post_init__(self) -> None:
        if not self.index:
            raise ValueError('the index is missing: llm2clip search INDEX "a text"')
        if not self.query and not self.image:
            raise ValueError(f'the query is missing: llm2clip search {self.index} "a text", or --image FILE')
        if any(not text.strip() for text in self.query):
            raise ValueError("a query is empty; leave it out or write a text.")
        if self.where is not None and not self.where.strip():
            raise ValueError('where is empty; leave it out, or write a condition: --where "size > 1000"')
        if self.top < 1:
            raise ValueError(f"top must be at least 1, not {self.top}.")


def run(config: SearchConfig) -> None:
    """Search, print the results, and write them to the files in the settings.

    Raises:
        FileNotFoundError: The index, model or image file does not exist.
        NonFiniteError: The model's embedding of a query is NaN or infinite.
        ValueError: Another model made the index, the image cannot be read, `where` is no condition on its columns, or
            a picture of captions without images is asked for.
    """
    index = ImageIndex.open(config.index, config.postgres)
    if config.picture and not index.manifest.has_images:
        raise ValueError(
            f"picture is {config.picture}, but the captions of the index {index.place} have no images; leave it out, "
            "or write a page of them: --html FILE"
        )
    if config.image and not Path(config.image).is_file():
        raise FileNotFoundError(f"there is no image file {config.image}.")
    image = decode_image(config.image, config.image) if config.image else None
    name, revision = _model_of(config, index)
    needs = ["image", "text"] if config.query else ["image"]
    encoder = OurEncoder.load(name, revision, needs, hint="A text query needs the whole model with its LLM.")
    _require_model(index, encoder, bool(config.query))
    queries: list[tuple[str, Image.Image | None]] = [(text, None) for text in config.query]
    embeds = [encoder.encode_text(config.query)] if config.query else []
    if config.image:
        queries.append((config.image, image))
        embeds.append(encoder.encode_image(image, names=[config.image]))
    found = []
    for query, rows in zip(queries, index.search(torch.cat(embeds).numpy(), config.top, config.where), strict=True):
        results = [SearchResult.from_row(row, score, index.manifest) for score, row in rows]
        found.append(QueryResults(*query, results))
    if config.json:
        result = {"index": config.index, "model": name, "queries": [entry.as_dict() for entry in found]}
        print(printable(json.dumps(result, indent=2, ensure_ascii=False)))
    else:
        _print_tables(found, index.manifest.embed)
    if config.html or config.picture:
        _write_files(config, found, ResultImages(index.manifest))


def _write_files(config: SearchConfig, found: list[QueryResults], images: ResultImages) -> None:
    if config.html:
        write_page(Path(config.html), found, images)
        logger.info("wrote %s", config.html)
    if config.picture:
        from llm2clip.search.picture import draw_picture  # matplotlib starts slowly

        draw_picture(Path(config.picture), found, images)
        logger.info("wrote %s", config.picture)


def _require_model(index: ImageIndex, encoder: OurEncoder, has_texts: bool) -> None:
    """Raise ValueError unless the model made the index: its side of images, and of texts where both have them."""
    text_fingerprint = None
    if has_texts and index.manifest.text_fingerprint is not None:  # reading all weights takes seconds
        text_fingerprint = encoder.text_fingerprint()
    index.manifest.require_model(index.place, encoder, encoder.image_fingerprint(), text_fingerprint)


def _model_of(config: SearchConfig, index: ImageIndex) -> tuple[str, str | None]:
    if config.model:
        return config.model, config.model_revision
    name = index.manifest.model
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(
            f"the index {config.index} was made by the model in {name}, which no longer exists; give its new place: "
            "--model FOLDER"
        )
    return name, config.model_revision or index.manifest.revision


def _print_tables(found: list[QueryResults], embed: str) -> None:
    # Queries and captions are not markup: "[bold]" and ":dog:" are printed as they are.
    console = Console(markup=False, emoji=False)
    for entry in found:
        table = Table(title=printable(entry.title), title_justify="left", title_style="bold")
        table.add_column("rank", justify="right")
        table.add_column("score", justify="right")
        captioned = any(result.caption for result in entry.results)
        # What was found comes first.
        names = ["caption", "row"] if embed == "caption" else ["image", *["caption"] * captioned]
        for name in names:
            table.add_column(name, overflow="ellipsis" if name == "caption" else "fold")
        for rank, result in enumerate(entry.results, 1):
            shown = {"image": result.place, "row": result.key, "caption": result.caption or ""}
            cells = [str(rank), f"{result.score:.3f}", *(shown[name] for name in names)]
            table.add_row(*map(printable, cells))
        console.print(table)
