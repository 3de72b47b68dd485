"""A row of captioned images: its columns, its captions with their ids, of which one is drawn, or why it is skipped."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from modeling_llm2clip.image_decoding_llm2clip import SampleError
from modeling_llm2clip.tokenization_llm2clip import SURROGATE

# What to do with a damaged image or a row without caption.
OnError = Literal["raise", "skip"]
NO_EMBEDDING = "its caption has no stored embedding"
# Rows that a message names.
SHOWN = 20


class CaptionError(SampleError):
    """A row without caption, or with a caption that is not text."""


class SkippedSample(NamedTuple):
    """A row that cannot be used, and why."""

    key: str
    reason: str


def unusable_batch_error(skipped: Sequence[SkippedSample]) -> ValueError:
    """Make the error of a batch of which every row is skipped."""
    shown = "; ".join(f"{key}: {reason}" for key, reason in skipped[:SHOWN])
    more = f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    return ValueError(
        f"none of the {len(skipped)} rows of a batch can be used ({shown}{more}); mend or remove these rows, or raise "
        "the batch size."
    )


class Columns(NamedTuple):
    """The columns of a table that a `CaptionSource` uses; `key` is None if rows are identified by number."""

    image: str | None
    key: str | None
    captions: list[str]
    weights: list[float] | None


def captioned_row(
    values: Mapping[str, Any], columns: Columns, number: str, seed_parts: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Return a row as [`Stage2Collator`] takes it: what is stored, and what its random parts depend on.

    Args:
        values: The row of a table.
        number: Its key, if the table has none.
        seed_parts: What the drawn caption and the crop depend on.
    """
    key = None if columns.key is None else values[columns.key]
    row: dict[str, Any] = {
        "key": number if key is None else str(key),
        "caption": {column: column_value(values, column) for column in columns.captions},
        "caption_weights": columns.weights,
        "seed_parts": seed_parts,
    }
    return row if columns.image is None else {**row, "image": values.get(columns.image)}


def column_value(row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, where `a.b` is field `b` of the record in column `a` (None if absent)."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        # Most records are dicts, and the test for mappings is slow.
        value = value.get(part) if isinstance(value, dict) or isinstance(value, Mapping) else None  # noqa: SIM101
    return value


def clean_caption(text: Any) -> str | None:
    """Strip surrounding white space; returns None for an empty or missing text.

    Raises:
        TypeError: If `text` is something else than text, or has a lone surrogate, which no encoding has.
    """
    if isinstance(text, str):
        if not text.isascii() and (half := SURROGATE.search(text)) is not None:
            raise TypeError(f"a caption must be text, but {text!r:.80} has half a character (U+{ord(half[0]):04X})")
        return text.strip() or None
    if text is None or (isinstance(text, float) and np.isnan(text)):
        return None
    raise TypeError(f"a caption must be text, not {type(text).__name__} ({text!r:.80})")


def caption_id(text: str) -> int:
    """Compute an id that captions share if they differ only in case and white space.

    Captions with equal ids are positives of each other's images, never negatives. The id is 63 bits of the BLAKE2b
    hash of the case-folded text with collapsed white space: non-negative and the same on every machine.
    """
    return _hash(" ".join(unicodedata.normalize("NFC", text).casefold().split()))


def stable_seed(*parts: int | str) -> int:
    """Hash `parts` to a non-negative 63-bit number that is the same on every machine and Python version."""
    return _hash("\x1f".join(f"{type(part).__name__}:{part}" for part in parts))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def column_texts(row: Mapping[str, Any], column: str) -> list[str]:
    """Return the non-empty texts of a column, which has a text or a list of texts.

    Raises:
        TypeError: If the column contains something else than text; the message names it.
    """
    value = column_value(row, column)
    try:
        # Texts first: they are most values, and the test for sequences is slow.
        values = value if not isinstance(value, str) and isinstance(value, Sequence) else [value]
        return [text for text in map(clean_caption, values) if text is not None]
    except TypeError as error:
        raise TypeError(f"column {column!r}: {error}") from None


class RowCaptions(NamedTuple):
    """All captions of a row, in column order, the sampling weight of each, and the key of the row."""

    texts: list[str]
    weights: list[float]
    key: str


def captions_of(
    row: Mapping[str, Any], key: str, columns: Iterable[str], weights: Sequence[float] | None
) -> RowCaptions:
    """Read the captions of the row `key`; the entries of a list share the weight of its column, by default 1.

    Raises:
        CaptionError: If no caption can be drawn or one is not text.
    """
    texts: list[str] = []
    shares: list[float] = []
    columns = list(columns)
    for column, weight in zip(columns, weights or [1.0] * len(columns), strict=True):
        try:
            entries = column_texts(row, column)
        except TypeError as error:
            raise CaptionError(key, str(error)) from None
        texts += entries
        shares += [weight / max(1, len(entries))] * len(entries)
    if not sum(shares):
        raise CaptionError(key, f"it has no text in {', '.join(columns)}")
    return RowCaptions(texts, shares, key)


def draw_caption(captions: RowCaptions, seed: int) -> str:
    """Draw a caption by weight, as a function of `seed`."""
    drawable = [text for text, weight in zip(captions.texts, captions.weights, strict=True) if weight]
    if len(drawable) == 1:
        return drawable[0]
    bounds = np.cumsum(captions.weights)
    point = np.random.default_rng(seed).random()
    return captions.texts[int(np.searchsorted(bounds / bounds[-1], point, side="right"))]
