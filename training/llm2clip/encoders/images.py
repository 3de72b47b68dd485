"""Sets of images that are embedded: numbered, decoded on demand, and known by their content."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import datasets
import numpy as np
from PIL import Image

from llm2clip.data import DEFAULT_MAX_PIXELS
from llm2clip.data.rows import Columns
from llm2clip.data.table_identity import content_keys, image_keys
from llm2clip.data.transforms import Decoder


class ImageSet(Protocol):
    """Numbered images that are decoded on demand, and known by their content: what is computed of them is stored."""

    def __len__(self) -> int: ...

    def decode(self, row: int, decode: Decoder) -> Any:
        """Decode one image to RGB by `decode(value, key, max_pixels)`; raises SampleError if it cannot be used."""
        ...

    def key(self, row: int) -> str:
        """Name of an image in errors."""
        ...

    def content_keys(self) -> np.ndarray:
        """Hash the encoded images, `(images, 2)` int64."""
        ...


class ImageList:
    """A list of images as an [`ImageSet`]: whatever `decode_image` accepts, such as PIL images, paths and bytes.

    Args:
        names: Names in messages, one for each image; by default the path of a file, and the position in the list of
            any other image.
        max_pixels: Largest image to decode, width x height.
    """

    def __init__(
        self, images: Sequence[Any], names: Sequence[str] | None = None, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> None:
        self.images, self.names, self.max_pixels = images, names, max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def content_keys(self) -> np.ndarray:
        """Hash encoded images or the files of paths; TypeError for images of another kind."""
        return content_keys(self.images)

    def decode(self, row: int, decode: Decoder) -> Any:
        return decode(self.images[row], self.key(row), self.max_pixels)

    def key(self, row: int) -> str:
        if self.names is not None:
            return self.names[row]
        image = self.images[row]
        return os.fspath(image) if isinstance(image, (str, os.PathLike)) else str(row)


def image_list(images: Sequence[Any] | Any, names: Sequence[str] | None = None) -> ImageList:
    """Return images as an [`ImageList`]; one image, also as an array or tensor, counts as a list of one."""
    single = isinstance(images, (str, bytes, os.PathLike, dict, Image.Image)) or getattr(images, "ndim", 4) < 4
    return ImageList([images] if single else images, names)


class TableImages:
    """The images of a table as an [`ImageSet`]."""

    def __init__(self, table: datasets.Dataset, columns: Columns, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        assert columns.image is not None
        self.images = table.select_columns([columns.image])
        self.keys = table.select_columns([columns.key]) if columns.key is not None else None
        self.columns = columns
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def decode(self, row: int, decode: Decoder) -> Any:
        return decode(self.images[row][self.columns.image], self.key(row), self.max_pixels)

    def key(self, row: int) -> str:
        """Key of the row, by default its number."""
        return str(row) if self.keys is None else str(self.keys[row][self.columns.key])

    def content_keys(self) -> np.ndarray:
        """Hash the encoded images; see [`image_keys`]."""
        assert self.columns.image is not None
        return image_keys(self.images, self.columns.image)


class ChosenImages:
    """Some rows of an [`ImageSet`], as one."""

    def __init__(self, images: ImageSet, rows: Sequence[int]) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def decode(self, row: int, decode: Decoder) -> Any:
        return self.images.decode(self.rows[row], decode)

    def key(self, row: int) -> str:
        return self.images.key(self.rows[row])

    def content_keys(self) -> np.ndarray:
        return self.images.content_keys()[np.asarray(self.rows, dtype=np.int64)]


class JoinedImages:
    """The images of several sets as one."""

    def __init__(self, sets: Sequence[ImageSet]) -> None:
        self.sets, self.bounds = sets, np.cumsum([0, *map(len, sets)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def _place(self, row: int) -> tuple[ImageSet, int]:
        number = int(np.searchsorted(self.bounds, row, side="right")) - 1
        return self.sets[number], row - int(self.bounds[number])

    def decode(self, row: int, decode: Decoder) -> Any:
        images, own = self._place(row)
        return images.decode(own, decode)

    def key(self, row: int) -> str:
        images, own = self._place(row)
        return images.key(own)

    def content_keys(self) -> np.ndarray:
        return np.concatenate([images.content_keys() for images in self.sets]).astype(np.int64)
