"""Search results, and the images that they refer to."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip.data import SampleError, decode_image
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.table_captions import TableCaptions
from llm2clip.search.table_images import TableImages


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
        caption_column, caption_number: In an index of captions, its column, and its place in a list there.
    """

    score: float
    key: str
    path: str | None = None
    row: int | None = None
    hash: str | None = None
    caption: str | None = None
    caption_column: str | None = None
    caption_number: int | None = None

    @classmethod
    def from_row(cls, row: dict[str, Any], score: float, manifest: IndexManifest) -> SearchResult:
        """Build a result from a row of an index."""
        path = str(Path(manifest.source["path"]) / row["key"]) if manifest.source["kind"] == "folder" else None
        names = ["row", "hash", "caption"]
        if manifest.embed == "caption":  # an index of images may have metadata of these names
            names += ["caption_column", "caption_number"]
        return cls(score, row["key"], path, **{name: row.get(name) for name in names})

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
        text: The query, or the file name of its image.
        image: The image of a query by image, in RGB.
    """

    text: str
    image: Image.Image | None
    results: list[SearchResult]

    @property
    def title(self) -> str:
        """Heading above the results."""
        return self.text if self.image is None else f"like {self.text}"

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types, without empty fields."""
        results = [
            {"rank": rank, **{name: value for name, value in vars(result).items() if value is not None}}
            for rank, result in enumerate(self.results, 1)
        ]
        return {"text" if self.image is None else "image": self.text, "results": results}


class ResultImages:
    """The images of search results, read from where they were indexed; those of captions, if they have images.

    Args:
        table: The indexed data set, if it is already open.

    Attributes:
        embed: What the index is of, image or caption.
        exist: Whether the rows have images.
    """

    def __init__(self, manifest: IndexManifest, table: TableImages | TableCaptions | None = None) -> None:
        self.max_pixels = manifest.max_pixels
        self.embed, self.exist = manifest.embed, manifest.has_images
        self.table = table
        if table is None and manifest.source["kind"] == "dataset":
            options = {name: value for name, value in manifest.source.items() if name != "kind"}
            kind: type[TableImages | TableCaptions] = TableCaptions if self.embed == "caption" else TableImages
            self.table = kind(**options, max_pixels=self.max_pixels)

    def load(self, result: SearchResult) -> Image.Image | None:
        """Decode the image of a result; None if it or its caption has been removed, damaged, or replaced."""
        with contextlib.suppress(SampleError):
            if self.table is None:
                return decode_image(result.path, result.key, self.max_pixels)
            if self.exist and result.row is not None and self.table.has(result.row, result.hash):
                return self.table.decode(result.row)
        return None
