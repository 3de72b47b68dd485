"""`llm2clip search`: the images of an index that fit a text or another image."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from llm2clip.data import decode_image
from llm2clip.embedding.image_embedder import ImageEmbedder
from llm2clip.search.image_index import ImageIndex
from llm2clip.search.results import Found, Query, Thumbnails

logger = logging.getLogger(__name__)


@dataclass
class SearchConfig:
    """Settings of `llm2clip search`."""

    index: str = field(default="", metadata={"help": "The index: a folder that llm2clip index wrote."})
    query: list[str] = field(
        default_factory=list, metadata={"help": "Texts, each in quotes; the LLM is loaded once for all of them."}
    )
    image: str | None = field(
        default=None, metadata={"help": "Image file to search by; the LLM is not loaded for it."}
    )
    top: int = field(default=10, metadata={"help": "Images that are shown for each query."})
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the model; unset: the one that made the index."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of tables."})
    html: str | None = field(
        default=None, metadata={"help": "Also write a page of thumbnails to this file; it needs no other file."}
    )
    picture: str | None = field(
        default=None, metadata={"help": "Also draw a row of thumbnails for each query into this PNG file."}
    )

    def __post_init__(self) -> None:
        if not self.index:
            raise ValueError('give an index: llm2clip search INDEX "a text"')
        if not self.query and not self.image:
            raise ValueError(f'say what to search: llm2clip search {self.index} "a text", or --image FILE')
        if any(not text.strip() for text in self.query):
            raise ValueError("a query is empty; leave it out or give it a text.")
        if self.top < 1:
            raise ValueError(f"top must be at least 1, not {self.top}.")


def run(config: SearchConfig) -> dict[str, Any]:
    """Search, and show what was found.

    Returns:
        Nothing; the result is printed, and written where the settings say.

    Raises:
        FileNotFoundError: There is no such index, model or image file.
        ValueError: The model is not the one that made the index, or an image cannot be read.
    """
    index = ImageIndex.open(config.index)
    image = _read_image(config.image) if config.image else None
    name, revision = _model_of(config, index)
    embedder = ImageEmbedder.load(name, revision, with_llm=bool(config.query))
    index.manifest.require_model(index.folder, name, embedder.fingerprint(), embedder.width)
    queries = [Query(text) for text in config.query]
    embeds = []
    if queries:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        embeds += list(embedder.model.encode_text(config.query, tokenizer).numpy())
    if config.image and image is not None:
        queries.append(Query(config.image, image))
        embeds.append(embedder.embed(image, config.image))
    rows = index.search(np.stack(embeds), config.top)
    found = [Found.of(query, row, index.manifest) for query, row in zip(queries, rows, strict=True)]
    if config.json:
        result = {"index": config.index, "model": name, "queries": [each.as_dict() for each in found]}
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        _print_tables(found)
    if config.html or config.picture:
        _draw(config, found, Thumbnails(index.manifest))
    return {}


def _read_image(name: str) -> Image.Image:
    if not Path(name).is_file():
        raise FileNotFoundError(f"there is no image file {name}.")
    return decode_image(name, name)


def _model_of(config: SearchConfig, index: ImageIndex) -> tuple[str, str | None]:
    if config.model:
        return config.model, config.model_revision
    name = index.manifest.model
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise FileNotFoundError(
            f"the index {config.index} was made by the model in {name}, which is not there any more; say where it is: "
            "--model FOLDER"
        )
    return name, config.model_revision or index.manifest.revision


def _print_tables(found: list[Found]) -> None:
    # What users typed and captions say is text: "[bold]" and ":dog:" too.
    console = Console(markup=False, emoji=False)
    for each in found:
        table = Table(title=each.query.title, title_justify="left", title_style="bold")
        table.add_column("rank", justify="right")
        table.add_column("score", justify="right")
        table.add_column("image", overflow="fold")
        captioned = any(image.caption for image in each.images)
        if captioned:
            table.add_column("caption")
        for rank, image in enumerate(each.images, 1):
            cells = [str(rank), f"{image.score:.3f}", image.place]
            table.add_row(*cells, *([image.caption or ""] if captioned else []))
        console.print(table)


def _draw(config: SearchConfig, found: list[Found], thumbnails: Thumbnails) -> None:
    if config.html:
        from llm2clip.search.page import write_page

        write_page(Path(config.html), found, thumbnails)
        logger.info("wrote %s", config.html)
    if config.picture:
        from llm2clip.search.picture import draw_picture

        draw_picture(Path(config.picture), found, thumbnails)
        logger.info("wrote %s", config.picture)


__all__ = ["SearchConfig", "run"]
