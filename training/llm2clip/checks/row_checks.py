"""What is in the rows of a data set, and what is wrong with them.

A check is fed with all rows and then gives its part of the report. Rows are read, and images decoded, in worker
processes, which send back [`RowFacts`] instead of pictures.
"""

from __future__ import annotations

import html
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol

from ftfy.badness import is_bad
from PIL import Image

from llm2clip.data.rows import CaptionError, caption_id, captions_of, column_texts
from llm2clip.store.store import caption_keys
from modeling_llm2clip.image_decoding_llm2clip import (
    DEFAULT_MAX_PIXELS,
    DamagedImageError,
    decoding_errors,
    open_image,
    to_upright_rgb,
)

# Rows that a worker process sends at once.
BATCH = 32
NUM_EXAMPLES = 5
NO_CAPTION, NOT_TEXT = "no caption", "captions that are not text"
MISSING, BROKEN, TOO_LARGE = "missing images", "broken images", "images above max_pixels"
ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});")


def has_entity(text: str) -> bool:
    """Tell whether a text contains HTML entities, such as `&amp;` and `&#39;`."""
    return any(html.unescape(entity) != entity for entity in ENTITY.findall(text))


# What a text has carried over from a web page or a wrong decoding, in the words of the report.
TEXT_FAULTS: dict[str, Callable[[str], object]] = {
    "HTML entities": has_entity,
    "HTML tags": re.compile(r"</?[A-Za-z][^<>]*>|<!--").search,
    # White space apart, which tokenizers know and captions of several lines contain.
    "control characters": re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]").search,
    "U+FFFD": re.compile("\N{REPLACEMENT CHARACTER}").search,  # in whose place a decoder did not understand the bytes
    # UTF-8 that was decoded as something else (`LÃ©zard` for `Lézard`).
    "mojibake": is_bad,
}
# Forms of letters, which are part of their names but no script.
FORMS = ("FULLWIDTH", "HALFWIDTH", "MODIFIER", "MATHEMATICAL")
KANA = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")


def script(text: str) -> str:
    """Name the script of most letters of a text by the first word of their Unicode names, such as `latin` and `cjk`.

    A text with kana is `kana` even if most of it is Chinese characters, since it is Japanese. A text without letters
    is `none`.
    """
    counts = Counter(_script_of_letter(letter) for letter in text if letter.isalpha())
    if not counts:
        return "none"
    most = counts.most_common(1)[0][0]
    return "kana" if most == "cjk" and counts["kana"] else most


@cache
def _script_of_letter(letter: str) -> str:
    words = unicodedata.name(letter, "UNNAMED").split()
    word = next((word for word in words if word not in FORMS), words[0])
    return "kana" if word in KANA else word.lower()


class ImageFacts(NamedTuple):
    """What is known about an image: its upright width and height in pixels, or its fault and the reason.

    Attributes:
        hash: Its perceptual hash, if one was asked for.
    """

    width: int = 0
    height: int = 0
    fault: str | None = None
    reason: str = ""
    hash: int | None = None


class RowFacts(NamedTuple):
    """What is known about a row.

    Attributes:
        texts: The captions of each column; empty if one of them is not text.
        fault: Why no caption can be drawn, `NO_CAPTION` or `NOT_TEXT`, or None; the reason is in words.
        image: None if images are not read.
    """

    key: str
    texts: dict[str, list[str]]
    fault: str | None = None
    reason: str = ""
    image: ImageFacts | None = None


@dataclass(frozen=True)
class RowReader:
    """Reads the facts of rows, as data sets of captioned images yield them.

    Args:
        hash_image: Computes the perceptual hash of each image.
    """

    max_pixels: int = DEFAULT_MAX_PIXELS
    hash_image: Callable[[Image.Image], int] | None = None

    def read_all(self, rows: Sequence[Mapping[str, Any]]) -> list[RowFacts]:
        """Read the facts of rows."""
        return [self._read(row) for row in rows]

    def _read(self, row: Mapping[str, Any]) -> RowFacts:
        key, columns, image = row["key"], row["caption"], None
        if "image" in row:
            image = inspect_image(row["image"], key, self.max_pixels, self.hash_image)
        try:
            texts = {column: column_texts(columns, column) for column in columns}
        except TypeError as error:
            return RowFacts(key, {}, NOT_TEXT, str(error), image)
        try:
            captions_of(columns, key, columns, row["caption_weights"])
        except CaptionError as error:
            return RowFacts(key, texts, NO_CAPTION, str(error.reason), image)
        return RowFacts(key, texts, image=image)


def inspect_image(
    value: Any, key: str, max_pixels: int, hash_image: Callable[[Image.Image], int] | None = None
) -> ImageFacts:
    """Decode an image as training does, for its size or what is wrong with it; see `decode_image` for `value`."""
    try:
        with decoding_errors(value, key):
            image = open_image(value, sys.maxsize)
            if image.width * image.height > max_pixels:
                return ImageFacts(fault=TOO_LARGE, reason=f"{image.width} x {image.height} pixels")
            image = to_upright_rgb(image)
            return ImageFacts(*image.size, hash=None if hash_image is None else hash_image(image))
    except DamagedImageError as error:
        content = value.values() if isinstance(value, Mapping) else [value]
        is_missing = all(part is None for part in content) or isinstance(error.__cause__, FileNotFoundError)
        return ImageFacts(fault=MISSING if is_missing else BROKEN, reason=str(error.reason))


@dataclass
class Finding:
    """A fault or oddity: how often it was found, and the first examples.

    Attributes:
        stops: Whether a row that has it cannot be used, which ends a run with `on_error: raise`.
        examples: Key and detail of the first rows.
    """

    stops: bool = False
    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, key: str, detail: str) -> None:
        """Count a case."""
        self.count += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append({"key": key, "detail": detail})


class Check(Protocol):
    """One subject of the report.

    Attributes:
        findings: What it looks for, by name.
    """

    findings: dict[str, Finding]

    def add(self, row: RowFacts) -> None:
        """Take a row into account."""
        ...

    def summary(self) -> dict[str, Any]:
        """Return its part of the report, as JSON values, beside the findings."""
        ...


def report_of(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the parts of some checks and their `findings`, as JSON values; `images` is None if none is of images."""
    parts = {name: part for check in checks for name, part in check.summary().items()}
    findings = {name: vars(finding) for check in checks for name, finding in check.findings.items()}
    return {"images": None, **parts, "findings": findings}


class RowCheck:
    """Counts the rows, and those that cannot be used."""

    def __init__(self) -> None:
        self.findings = {NO_CAPTION: Finding(stops=True), NOT_TEXT: Finding(stops=True)}
        self.num_rows = self.num_usable = 0

    def add(self, row: RowFacts) -> None:
        self.num_rows += 1
        self.num_usable += row.fault is None and (row.image is None or row.image.fault is None)
        if row.fault is not None:
            self.findings[row.fault].add(row.key, row.reason)

    def summary(self) -> dict[str, Any]:
        return {"rows": self.num_rows, "usable_rows": self.num_usable}


class CaptionCheck:
    """Counts the captions of each column and of each script, and repeated ones; measures their length in words.

    Words are separated by white space, so that a caption in Chinese or Japanese is one word.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self.findings = {"repeated captions": Finding()}
        self.num_rows: Counter[str] = Counter()
        self.num_words: dict[str, Counter[int]] = {column: Counter() for column in columns}
        self.scripts: Counter[str] = Counter()
        # Hashes, since the texts of millions of captions fill the memory.
        self.seen: set[int] = set()
        self.ids: set[int] = set()

    def add(self, row: RowFacts) -> None:
        for column, texts in row.texts.items():
            self.num_rows[column] += bool(texts)
            for text in texts:
                self.num_words[column][len(text.split())] += 1
                self.scripts[script(text)] += 1
                self.ids.add(caption_id(text))
                number = int(caption_keys([text])[0, 0])
                if number in self.seen:
                    self.findings["repeated captions"].add(row.key, text)
                self.seen.add(number)

    def summary(self) -> dict[str, Any]:
        columns = {
            column: {"rows": self.num_rows[column], "captions": counts.total(), "words": distribution(counts)}
            for column, counts in self.num_words.items()
        }
        captions = {
            "count": sum(counts.total() for counts in self.num_words.values()),
            "distinct": len(self.seen),
            "distinct_ignoring_case_and_space": len(self.ids),
            "columns": columns,
            "scripts": dict(self.scripts.most_common()),
        }
        return {"captions": captions}


class TextFaultCheck:
    """Finds captions with the faults of `TEXT_FAULTS`."""

    def __init__(self) -> None:
        self.findings = {name: Finding() for name in TEXT_FAULTS}

    def add(self, row: RowFacts) -> None:
        for text in (text for texts in row.texts.values() for text in texts):
            for name, has_fault in TEXT_FAULTS.items():
                if has_fault(text):
                    self.findings[name].add(row.key, text)

    def summary(self) -> dict[str, Any]:
        return {}


class ImageCheck:
    """Finds images that cannot be used, and measures the others."""

    def __init__(self) -> None:
        self.findings = {name: Finding(stops=True) for name in (MISSING, BROKEN, TOO_LARGE)}
        self.widths: Counter[int] = Counter()
        self.heights: Counter[int] = Counter()

    def add(self, row: RowFacts) -> None:
        assert row.image is not None
        if row.image.fault is not None:
            self.findings[row.image.fault].add(row.key, row.image.reason)
        else:
            self.widths[row.image.width] += 1
            self.heights[row.image.height] += 1

    def summary(self) -> dict[str, Any]:
        sizes = {"width": distribution(self.widths), "height": distribution(self.heights)}
        return {"images": {"count": self.widths.total(), **sizes}}


def distribution(counts: Counter[int]) -> dict[str, int] | None:
    """Summarise counted numbers by minimum, median, 95th percentile and maximum; None if there are none.

    A percentile is the smallest of the numbers that as many per cent of them do not exceed.
    """
    if not counts:
        return None
    numbers = sorted(counts)
    wanted = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    summary, below = {}, 0
    for number in numbers:
        below += counts[number]
        for name, share in wanted.items():
            if name not in summary and below >= share * counts.total():
                summary[name] = number
    return {name: summary[name] for name in wanted}
