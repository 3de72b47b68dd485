"""What was found for a query, and the pictures of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip.data import SampleError, decode_image
from llm2clip.search.image_index import IndexManifest
from llm2clip.search.image_sets import TableImages


@dataclass
class Query:
    """A text, or an image by its file name.

    Attributes:
        text: The text or the file name.
        image: The image, in RGB.
    """

    text: str
    image: Image.Image | None = None

    @property
    def title(self) -> str:
        """As it stands above its results."""
        return self.text if self.image is None else f"like {self.text}"


@dataclass
class FoundImage:
    """One result.

    Attributes:
        score: Cosine with the query.
        key: Its path relative to the folder, or its key in the data set.
        path: Its file, where it has one.
        row: Its row in the data set when that was indexed, where it is in one.
        hash: Of its bytes in the data set.
        caption: Its text, where the data set has one.
    """

    score: float
    key: str
    path: str | None = None
    row: int | None = None
    hash: str | None = None
    caption: str | None = None

    @property
    def place(self) -> str:
        """Where a user finds it; a path from the working directory where it is inside that."""
        if self.path is None:
            return self.key
        path = Path(self.path)
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else self.path


@dataclass
class Found:
    """A query and its results, best first."""

    query: Query
    images: list[FoundImage]

    @classmethod
    def of(cls, query: Query, rows: list[tuple[float, dict[str, Any]]], manifest: IndexManifest) -> Found:
        """From what an index gives; see `ImageIndex.search`."""
        is_folder = manifest.source["kind"] == "folder"
        images = [
            FoundImage(
                score,
                row["key"],
                str(Path(manifest.source["path"]) / row["key"]) if is_folder else None,
                row.get("row"),
                row.get("hash"),
                row.get("caption"),
            )
            for score, row in rows
        ]
        return cls(query, images)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what a result does not have is left out."""
        results = [
            {"rank": rank, **{name: value for name, value in vars(image).items() if value is not None}}
            for rank, image in enumerate(self.images, 1)
        ]
        return {"text" if self.query.image is None else "image": self.query.text, "results": results}


class Thumbnails:
    """The images of results, small, from where they were when they were indexed.

    Args:
        manifest: Of the index.
    """

    def __init__(self, manifest: IndexManifest) -> None:
        source = manifest.source
        self.max_pixels = manifest.max_pixels
        self.table: TableImages | None = None
        if source["kind"] == "dataset":
            names = ("path", "name", "split", "revision", "image_column")
            self.table = TableImages(**{name: source[name] for name in names}, max_pixels=manifest.max_pixels)

    def of(self, found: FoundImage, size: int) -> Image.Image | None:
        """The image of a result, no larger than `size` pixels either way; None where it is not there any more."""
        try:
            if self.table is None:
                image = decode_image(found.path, found.key, self.max_pixels)
            elif found.row is not None and self.table.holds(found.row, found.hash):
                image = self.table.decode(found.row)
            else:
                return None
        except SampleError:
            return None
        return thumbnail(image, size)


def thumbnail(image: Image.Image, size: int) -> Image.Image:
    """A copy no larger than `size` pixels either way; a small image stays as it is."""
    copy = image.copy()
    copy.thumbnail((size, size), Image.Resampling.LANCZOS)
    return copy
