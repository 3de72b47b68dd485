"""Search results, the images that they refer to, and a page that shows both."""

from __future__ import annotations

import base64
import contextlib
import html
import io
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip.data import SampleError, decode_image
from llm2clip.data.heif import prepare_heif
from llm2clip.files.atomic import write_text
from llm2clip.search.folder_items import Items
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.table_items import items_of

THUMBNAIL = 320
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1.2rem; color: #1d2430;
  background: #fafbfc; }
h1 { font-size: 1.35rem; font-weight: 600; margin: 2.2rem 0 1rem; display: flex; align-items: center; gap: .8rem; }
h1 img { width: 72px; height: 72px; object-fit: contain; border-radius: 6px; border: 1px solid #dde2ea;
  background: #fff; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); }
li { background: #fff; border: 1px solid #e3e7ee; border-radius: 10px; overflow: hidden; }
.frame { aspect-ratio: 1; display: flex; align-items: center; justify-content: center; background: #fff;
  border-bottom: 1px solid #eef1f5; color: #8792a5; }
.frame a { width: 100%; height: 100%; }
.frame img { max-width: 100%; width: 100%; height: 100%; object-fit: contain; }
.text { padding: .55rem .7rem .65rem; }
.line { display: flex; justify-content: space-between; font-size: .85rem; color: #5a6678; }
.score { font-variant-numeric: tabular-nums; font-weight: 600; color: #1d2430; }
.caption { margin: .15rem 0; }
.place { font-size: .78rem; color: #8792a5; overflow-wrap: anywhere; }
"""


@dataclass
class SearchResult:
    """One image or caption of an index.

    Attributes:
        score: Cosine similarity with the query.
        key: Its path relative to the folder, or its key in the data set.
        path: Its file, in an index of a folder.
        row: Its row when the data set was indexed, in an index of a data set.
        hash: Hash of its bytes in the data set, or of the caption.
        caption: The caption that was found, or that of the image.
        caption_column, caption_number: In an index of captions, its column, and its number in a list there.
        metadata: The metadata columns of the index by name, if it has any; dates and times as strings, as in `where`.
        relevance: With a cut-off of relevance, by how many standard deviations the score exceeds the mean of those
            that everyday captions have with the results.
    """

    score: float
    key: str
    path: str | None = None
    row: int | None = None
    hash: str | None = None
    caption: str | None = None
    caption_column: str | None = None
    caption_number: int | None = None
    metadata: dict[str, Any] | None = None
    relevance: float | None = None

    @classmethod
    def from_row(cls, row: dict[str, Any], score: float, manifest: IndexManifest) -> SearchResult:
        """Build a result from a row of an index."""
        path = str(Path(manifest.source["path"]) / row["key"]) if manifest.source["kind"] == "folder" else None
        names = ["row", "hash", "caption"]
        if manifest.embed == "caption":  # an index of images may have metadata of these names
            names += ["caption_column", "caption_number"]
        metadata = {
            name: row[name].isoformat() if isinstance(row[name], date) else row[name]
            for name in manifest.metadata_columns
        }
        return cls(score, row["key"], path, metadata=metadata or None, **{name: row.get(name) for name in names})

    @property
    def place(self) -> str:
        """Its file, relative to the working directory if it is inside, or its key."""
        if self.path is None:
            return self.key
        path = Path(self.path)
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else self.path


@dataclass
class QueryResults:
    """The results of a query, best first.

    Attributes:
        text: Its text, if it has one.
        image_file: The file name of its image, if it has one.
        image: The image, in RGB.
        without: The text that results move away from.
    """

    text: str | None
    image_file: str | None
    image: Image.Image | None
    results: list[SearchResult]
    without: str | None = None

    @property
    def name(self) -> str:
        """Its text, or else the file name of its image."""
        return self.text or self.image_file or ""

    @property
    def title(self) -> str:
        """Heading above the results."""
        like = None if self.image_file is None else f"like {self.image_file}"
        without = None if self.without is None else f"without {self.without}"
        return ", ".join(part for part in (self.text, like, without) if part is not None)

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types, without empty fields."""
        results = [{"rank": rank, **_given(vars(result))} for rank, result in enumerate(self.results, 1)]
        query = _given({"text": self.text, "image": self.image_file, "without": self.without})
        return {**query, "results": results}


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


class ResultImages:
    """The images of search results, read from where they were indexed; those of captions, if they have images.

    Args:
        table: The indexed data set, if it is already open.

    Attributes:
        exist: Whether the rows have images: all but captions of a source without.
    """

    def __init__(self, manifest: IndexManifest, table: Items | None = None) -> None:
        self.max_pixels = manifest.max_pixels
        is_folder = manifest.source["kind"] == "folder"
        self.exist = is_folder or manifest.source.get("image_column") is not None
        self.table: Any = None if is_folder else table or items_of(manifest)

    def load(self, result: SearchResult) -> Image.Image | None:
        """Decode the image of a result; None if it or its caption has been removed, damaged, or replaced."""
        with contextlib.suppress(SampleError):
            if self.table is None:
                prepare_heif(result.key)
                return decode_image(result.path, result.key, self.max_pixels)
            if self.exist and result.row is not None and self.table.has(result.row, result.hash):
                return self.table.decode(result.row)
        return None


def write_page(path: Path, queries: list[QueryResults], images: ResultImages) -> None:
    """Write the results of queries to one self-contained HTML file; thumbnails link to the files of their images."""
    title = html.escape(", ".join(query.title for query in queries))
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
    ]
    for query in queries:
        shown = "" if query.image is None else _thumbnail(query.image, "the query")
        parts.append(f"<h1>{shown}{html.escape(query.title)}</h1><ol>")
        parts += [_item(rank, result, images) for rank, result in enumerate(query.results, 1)]
        parts.append("</ol>")
    write_text(path, "\n".join([*parts, "</body></html>"]))


def _item(rank: int, result: SearchResult, images: ResultImages) -> str:
    image = images.load(result)
    shown = "no longer available" if image is None else _thumbnail(image, result.caption or result.key)
    if image is not None and result.path is not None:
        shown = f"<a href='{Path(result.path).as_uri()}'>{shown}</a>"
    frame = f"<div class='frame'>{shown}</div>" if images.exist else ""
    caption = f"<div class='caption'>{html.escape(result.caption)}</div>" if result.caption else ""
    facts = "; ".join(f"{name}: {value}" for name, value in (result.metadata or {}).items() if value is not None)
    metadata = f"<div class='place'>{html.escape(facts)}</div>" if facts else ""
    return (
        f"<li>{frame}<div class='text'>"
        f"<div class='line'><span>{rank}</span><span class='score'>{result.score:.3f}</span></div>{caption}"
        f"<div class='place'>{html.escape(result.place)}</div>{metadata}</div></li>"
    )


def _thumbnail(image: Image.Image, text: str) -> str:
    image, file = image.copy(), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(file, "WEBP", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='{html.escape(text)}' src='data:image/webp;base64,{data}'>"
