"""What is read from one row: its captions, their identities, and what is wrong with it."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from modeling_llm2clip.image_decoding_llm2clip import SampleError


class CaptionError(SampleError):
    """A row without any caption, or whose caption is not text."""


class SkippedSample(NamedTuple):
    """Stands in a batch where a row could not be used; the collator takes it out and reports it."""

    key: str
    reason: str


def clean_caption(text: Any) -> str | None:
    """`text` without surrounding white space, or None when nothing is left (or nothing was there)."""
    if text is None or (isinstance(text, float) and np.isnan(text)):
        return None
    if not isinstance(text, str):
        raise TypeError(f"a caption must be text, not {type(text).__name__} ({text!r:.80})")
    return text.strip() or None


def caption_id(text: str) -> int:
    """A number that says which captions are the same caption, whatever their case and spacing.

    Two captions with equal ids are correct answers for each other's images, never negatives.

    Args:
        text: The caption.

    Returns:
        63 bits of the BLAKE2b hash of the case-folded text with white space collapsed: non-negative, equal on
        every machine.
    """
    normal = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "big") >> 1


def caption_keys(captions: Iterable[str]) -> np.ndarray:
    """The embedding cache's keys: the 128-bit BLAKE2b hash of each exact text.

    Args:
        captions: n captions.

    Returns:
        (n, 2) int64.
    """
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in captions)
    return np.frombuffer(digests, dtype="<i8").reshape(-1, 2).astype(np.int64, copy=False)


def column_value(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, where `a.b` reaches field `b` of the record in column `a` (None if it is absent)."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def column_texts(row: Mapping[str, Any], column: str) -> list[str]:
    """The texts in a column, which holds one text or a list of them; empty ones are left out.

    Raises:
        TypeError: If the column holds something else than text.
    """
    value = column_value(row, column)
    entries = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    try:
        return [text for text in map(clean_caption, entries) if text is not None]
    except TypeError as error:
        raise TypeError(f"column {column!r}: {error}") from None


class RowCaptions(NamedTuple):
    """The captions of one row and how often each is drawn.

    Attributes:
        texts: All captions, in the order of the columns.
        weights: Sampling weight of each.
    """

    texts: list[str]
    weights: list[float]

    @classmethod
    def of(
        cls, row: Mapping[str, Any], key: str, columns: Sequence[str], weights: Sequence[float] | None
    ) -> RowCaptions:
        """Read the captions of a row.

        Args:
            row: The row.
            key: Its key, for the error.
            columns: Caption columns; one that holds a list shares its weight among the list's entries.
            weights: Weight of each column, equal if None.

        Raises:
            CaptionError: If there is no caption that could be drawn, or one is not text.
        """
        texts: list[str] = []
        shares: list[float] = []
        for position, column in enumerate(columns):
            try:
                entries = column_texts(row, column)
            except TypeError as error:
                raise CaptionError(key, str(error)) from None
            texts += entries
            shares += [(weights[position] if weights else 1.0) / len(entries)] * len(entries) if entries else []
        if not sum(shares):
            raise CaptionError(key, f"it has no text in {', '.join(columns)}")
        return cls(texts, shares)

    def draw(self, seed: int) -> str:
        """One caption, drawn by weight; a function of `seed`."""
        bounds = np.cumsum(self.weights)
        point = np.random.default_rng(seed).random()
        return self.texts[int(np.searchsorted(bounds / bounds[-1], point, side="right"))]
