"""The queries of a search: texts, images, and both as one, embedded in one call of the model for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from llm2clip.command_line.logs import shortened
from llm2clip.data.heif import prepare_heif
from llm2clip.encoders import Encoder

QueryImage: TypeAlias = Path | Image.Image
# A text, an image, or an image and a text as one query.
Query: TypeAlias = str | QueryImage | tuple[QueryImage, str]
# How far a query moves away from a text, in unit vectors: 1 loses many more of the results that are wanted.
AWAY = 0.75


def embed_queries(queries: Sequence[Query], open_encoder: Callable[[Sequence[str]], Encoder]) -> np.ndarray:
    """Embed queries: rows `(n, width)`, float32. That of an image and a text is the sum of their unit vectors.

    Args:
        open_encoder: Returns the model that embeds what is needed: `text`, `image` or both.

    Raises:
        ValueError: A pair is not an image and a text.
    """
    parts = [_parts(query) for query in queries]
    texts = {row: text for row, (_, text) in enumerate(parts) if text is not None}
    images = {row: image for row, (image, _) in enumerate(parts) if image is not None}
    encoder = open_encoder([*["text"] * bool(texts), *["image"] * bool(images)])
    rows = np.zeros((len(parts), encoder.width), np.float32)
    if texts:
        rows[list(texts)] += encoder.encode_text(list(texts.values())).numpy()
    for image in images.values():
        if isinstance(image, Path):
            prepare_heif(image)
    if images:
        names = [_image_name(image) for image in images.values()]
        rows[list(images)] += encoder.encode_image(list(images.values()), names=names).numpy()
    return rows


def unit_rows(rows: np.ndarray, width: int, names: Sequence[str]) -> np.ndarray:
    """Scale rows to unit length, float32.

    Args:
        names: Names of the queries in messages.

    Raises:
        ValueError: They are no rows of this width, or one is zero, NaN or infinite.
    """
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"queries have to be rows of width {width}, and are {rows.shape}.")
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if broken := np.flatnonzero(~((largest > 0) & np.isfinite(largest))).tolist():
        raise ValueError(
            f"the embeddings of {len(broken)} of {len(rows)} queries are zero, NaN or infinite: "
            f"{shortened([names[number] for number in broken])}. They have no direction, so that nothing is near."
        )
    rows = rows / largest  # whose squares are no infinities
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def away_from(rows: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Move unit rows away from the unit vector of a text: `row - AWAY * text`, scaled to unit length.

    By their cosines with the result, images are ranked by `cosine(row, image) - AWAY * cosine(text, image)`.
    """
    moved = rows - AWAY * text
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)


def query_name(query: Query) -> str:
    """Name a query in messages."""
    image, text = _parts(query)
    return " and ".join([*([] if image is None else [_image_name(image)]), *([] if text is None else [text])])


def _parts(query: Query) -> tuple[QueryImage | None, str | None]:
    """Return the image and the text of a query."""
    if not isinstance(query, tuple):
        return (None, query) if isinstance(query, str) else (query, None)
    if [isinstance(part, str) for part in query] != [False, True]:
        raise ValueError(f"a pair is (image, text), with a PIL image or the Path of one, not {query!r:.200}.")
    return query


def _image_name(image: QueryImage) -> str:
    return str(image) if isinstance(image, Path) else str(getattr(image, "filename", "") or "query")
