"""The command `llm2clip search`: find the images or captions of an index that match a text or an image.

Its mistakes are found before the libraries of models and of the index are imported, which takes many seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip.command_line.logs import print_whole, printable, quiet_libraries, shortened
from llm2clip.command_line.settings import nearest, setting
from llm2clip.files.atomic import read_json
from llm2clip.models.places import DTYPE, ModelDtype, require_model_place, require_recorded_model

if TYPE_CHECKING:
    from llm2clip.encoders.query_encoder import TextEncoder
    from llm2clip.search.results import QueryResults, SearchResult

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


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
    combine: bool = setting(False, "Search for each text together with --image, as one query: they are added.")
    without: str | None = setting(
        None, "A text that results move away from: 0.75 of its cosine with an image is taken off the query's."
    )
    where: str | None = setting(
        None,
        "Only rows that fulfil this condition in SQL on columns of the index, such as \"source = 'noto'\"; an index "
        "of a folder has key, folder, extension, size and mtime_ns, one of a data set key, row, hash, caption and its "
        "metadata_columns, and one of captions caption_column and caption_number too.",
    )
    top: int = setting(10, "Number of images or captions shown per query.")
    distinct: float | None = setting(
        None,
        "Leave out near-duplicates: results whose cosine with a better one is larger than this, such as 0.95. Others "
        "take their places.",
    )
    relevant: bool = setting(
        False, "Leave out results that do not fit a text clearly better than everyday captions do; perhaps all."
    )
    model: str | None = setting(None, "Hub id or folder of the model; by default the model that made the index.")
    model_revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub.")
    dtype: ModelDtype = setting("auto", DTYPE)
    fast: bool = setting(
        False, "Embed texts with the model's query encoder (llm2clip distill-text) in milliseconds, without its LLM."
    )
    query_encoder: str | None = setting(
        None,
        "Embed texts with this folder of llm2clip align --keep-images; the index's own model is for images alone.",
    )
    json: bool = setting(False, "Print JSON instead of tables.")
    postgres: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "URL of the PostgreSQL database that the index is in, as for llm2clip index."},
    )
    html: str | None = setting(None, "Also write the results to this self-contained HTML file, with thumbnails.")

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
        if self.fast and not (self.query or self.without):
            raise ValueError("fast is for texts, and --image alone needs no LLM; leave it out.")
        if self.query_encoder is not None and self.fast:
            raise ValueError("fast and query_encoder are both given; choose one.")
        if self.query_encoder is not None and not (self.query or self.without):
            raise ValueError("query_encoder is for texts; leave it out, or write a text.")
        if self.combine and not (self.query and self.image):
            raise ValueError("combine needs texts and --image FILE.")
        if self.without is not None and not self.without.strip():
            raise ValueError("without is empty; leave it out or write a text.")
        if self.distinct is not None and not 0 < self.distinct < 1:
            raise ValueError(f"distinct is a cosine between 0 and 1, such as 0.95, not {self.distinct}.")
        if self.relevant and self.image:
            raise ValueError("relevant compares texts with everyday captions; search with --image in another command.")


def run(config: SearchConfig) -> None:
    """Search, print the results, and write the page.

    On a terminal the results are tables. Elsewhere each is a line `IMAGE<TAB>SCORE`, with its caption as third column
    if it has one; of captions `CAPTION<TAB>SCORE<TAB>KEY`. Metadata columns follow. With several queries the
    query is a column before these.

    Raises:
        FileNotFoundError: The index, model or image file does not exist.
        NonFiniteError: The model's embedding of a query is NaN or infinite.
        ValueError: Another model made the index, the image cannot be read, or `where` is no condition on its columns.
    """
    if config.image and not Path(config.image).is_file():
        raise FileNotFoundError(f"there is no image file {config.image}.")
    if config.html and Path(config.html).is_dir():
        raise IsADirectoryError(f"html is the folder {config.html}; give a file in it: --html {config.html}/page.html")
    check_places(config.index, config.model, config.postgres)

    from llm2clip.data import decode_image
    from llm2clip.data.heif import prepare_heif
    from llm2clip.search.results import QueryResults, ResultImages, write_page
    from llm2clip.search.search_index import SearchIndex

    quiet_libraries()
    text_encoder: TextEncoder = "query" if config.fast else "llm"
    index = SearchIndex.open(
        config.index,
        config.postgres,
        config.model,
        config.model_revision,
        text_encoder,
        config.dtype,
        config.query_encoder,
    )
    given: list[tuple[str | None, Any]] = [(text, None) for text in config.query]
    if config.image:
        prepare_heif(config.image)
        image: Any = decode_image(config.image, config.image)
        image.filename = config.image  # for messages
        given = [(text, image) for text, _ in given] if config.combine else [*given, (None, image)]
    asked: list[Any] = [(image, text) if image and text else image or text for text, image in given]
    options: dict[str, Any] = {name: getattr(config, name) for name in ("without", "distinct", "relevant")}
    results = index.search(asked, config.top, config.where, **options)
    queries = [
        QueryResults(text, image and config.image, image, rows, config.without)
        for (text, image), rows in zip(given, results, strict=True)
    ]
    if config.where and not any(results):
        logger.warning("no row of the index fulfils --where %s", config.where)
    elif config.relevant and not all(results):
        names = [query.title for query in queries if not query.results]
        logger.warning("nothing in the index is relevant to: %s", shortened(names))
    if config.json:
        shown = [query.as_dict() for query in queries]
        result = {"index": config.index, "model": index.encoder([]).name, "queries": shown}
        print_whole(printable(json.dumps(result, indent=2, ensure_ascii=False)))
    elif sys.stdout.isatty():
        _print_tables(queries, index.manifest.embed)
    elif lines := _lines(queries, index.manifest.embed):
        print_whole("\n".join(lines))
    if config.html:
        write_page(Path(config.html), queries, ResultImages(index.manifest))
        logger.info("wrote %s", config.html)


def check_places(index: str | None, model: str | None, postgres: str | None = None) -> None:
    """Check that a local index, if there is one, and a model can exist, without the libraries of either.

    Args:
        model: The model that is given for the index; None for the one that made it.

    Raises:
        FileNotFoundError: One of them does not exist.
    """
    if model:
        require_model_place(model)
    if not index or postgres is not None or "://" in index:
        return
    manifest = Path(index) / MANIFEST
    if not manifest.is_file():
        raise FileNotFoundError(_no_index(Path(index)))
    if not model:
        with contextlib.suppress(ValueError):  # opening a damaged index says so
            require_recorded_model(index, str(read_json(manifest).get("model")))


def _no_index(folder: Path) -> str:
    if folder.is_dir():
        meant = ""
        advice = f"If these are the images: llm2clip index {folder} --model MODEL"
    else:
        meant = nearest(folder.name, [path.parent.name for path in folder.parent.glob(f"*/{MANIFEST}")])
        advice = f"To create one: llm2clip index IMAGES --model MODEL --output-dir {folder}"
    return (
        f"there is no index in {folder} (no {MANIFEST}){meant or '.'} {advice}. If a run was stopped, run the same "
        "llm2clip index again."
    )


def _columns(results: Sequence[SearchResult], embed: str) -> list[tuple[str, list[str]]]:
    """Return the columns that describe results, with their titles: the images or captions themselves come first."""
    names, captions = [result.place for result in results], [result.caption or "" for result in results]
    columns = [("image", names), *[("caption", captions)] * any(captions)]
    if embed == "caption":
        columns = [("caption", captions), ("row", names)]
    facts = [result.metadata or {} for result in results]
    for name in facts[0] if facts else ():
        columns.append((name, ["" if row[name] is None else str(row[name]) for row in facts]))
    return columns


def _lines(queries: list[QueryResults], embed: str) -> list[str]:
    lines = []
    for query in queries:
        first, *others = (cells for _, cells in _columns(query.results, embed))
        scores = [f"{result.score:.4f}" for result in query.results]
        texts = [[query.name] * len(scores)] if len(queries) > 1 else []
        for cells in zip(*texts, first, scores, *others, strict=True):
            lines.append("\t".join(printable(cell).replace("\t", "\\t").replace("\n", "\\n") for cell in cells))
    return lines


def _print_tables(queries: list[QueryResults], embed: str) -> None:
    from rich.console import Console

    from llm2clip.command_line.tables import print_table

    for query in queries:
        names, cells = zip(*_columns(query.results, embed), strict=True)
        scores = [f"{result.score:.3f}" for result in query.results]
        rows = [(str(rank), *row) for rank, row in enumerate(zip(scores, *cells, strict=True), 1)]
        print_table(Console(), query.title, ("rank", "score", *names), rows, range(2, 2 + len(names)))
