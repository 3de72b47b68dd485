"""Captions of a row, their ids and hashes, and rows that cannot be used."""

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


class CaptionError(SampleError):
    """A row without caption, or with a caption that is not text."""


class SkippedSample(NamedTuple):
    """Placeholder for a row that cannot be used; the collator removes and reports it."""

    key: str
    reason: str


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
    return int.from_bytes(_id_bytes(text), "big") >> 1


def caption_ids(texts: Iterable[str]) -> np.ndarray:
    """Compute the [`caption_id`] of many texts, (texts,) int64."""
    return (np.frombuffer(b"".join(map(_id_bytes, texts)), dtype=">u8") >> 1).astype(np.int64)


def _id_bytes(text: str) -> bytes:
    normal = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return hashlib.blake2b(normal.encode(), digest_size=8).digest()


def column_value(row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, where `a.b` is field `b` of the record in column `a` (None if absent)."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        # Most records are dicts, and the test for mappings is slow.
        value = value.get(part) if isinstance(value, dict) or isinstance(value, Mapping) else None  # noqa: SIM101
    return value


def value_texts(value: Any) -> list[str]:
    """Return the non-empty texts of a text or a list of texts.

    Raises:
        TypeError: If the value is, or the list contains, something else than text.
    """
    # Texts first: they are most values, and the test for sequences is slow.
    if isinstance(value, str) or not isinstance(value, Sequence):
        text = clean_caption(value)
        return [] if text is None else [text]
    return [text for text in map(clean_caption, value) if text is not None]


def column_texts(row: Mapping[str, Any], column: str) -> list[str]:
    """Return the [`value_texts`] of a column.

    Raises:
        TypeError: If the column contains something else than text; the message names it.
    """
    try:
        return value_texts(column_value(row, column))
    except TypeError as error:
        raise TypeError(f"column {column!r}: {error}") from None


class RowCaptions(NamedTuple):
    """All captions of a row, in column order, and the sampling weight of each."""

    texts: list[str]
    weights: list[float]

    @classmethod
    def of(
        cls, row: Mapping[str, Any], key: str, columns: Sequence[str], weights: Sequence[float] | None
    ) -> RowCaptions:
        """Read the captions of the row `key`; the entries of a list share the weight of its column, by default 1.

        Raises:
            CaptionError: If no caption can be drawn or one is not text.
        """
        texts: list[str] = []
        shares: list[float] = []
        for column, weight in zip(columns, weights or [1.0] * len(columns), strict=True):
            try:
                entries = column_texts(row, column)
            except TypeError as error:
                raise CaptionError(key, str(error)) from None
            texts += entries
            shares += [weight / max(1, len(entries))] * len(entries)
        if not sum(shares):
            raise CaptionError(key, f"it has no text in {', '.join(columns)}")
        return cls(texts, shares)

    def draw(self, seed: int) -> str:
        """Draw a caption by weight, as a function of `seed`."""
        drawable = [text for text, weight in zip(self.texts, self.weights, strict=True) if weight]
        if len(drawable) == 1:
            return drawable[0]
        bounds = np.cumsum(self.weights)
        point = np.random.default_rng(seed).random()
        return self.texts[int(np.searchsorted(bounds / bounds[-1], point, side="right"))]
