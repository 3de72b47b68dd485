"""Which rows of a set may make its counts differ from the published ones."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.evaluation.data import (
    ClassificationData,
    HardNegativeData,
    MultilingualData,
    RetrievalData,
    SeveralSets,
)
from llm2clip.evaluation.segmentation_data import SegmentationData

# Rows that a message names.
NAMED = 5


def unusual_rows(published: Mapping[str, int], data: Any, folder: Path) -> str:
    """Name the rows of data with other counts than the published ones that stand out.

    These are images and classes with another number of rows than the others or with none, repeated rows if there are
    too many, the last row or image if there are too few, and numbers that are missing among the names of images; in
    data of several parts (languages, kinds of choices, sets) those of each part.

    Args:
        published: The published counts.
        data: What the reader of a set returned.
        folder: The folder that was read, which the names leave out.

    Returns:
        A sentence; empty if nothing stands out.
    """
    words = "; ".join(filter(None, _facts(published, data))).replace(f"{folder}{os.sep}", "")
    return f"What stands out: {words}." if words else ""


def _facts(published: Mapping[str, int], data: Any) -> Iterator[str]:
    images, texts, parts = published.get("images", 0), published.get("texts", 0), data.parts()
    if isinstance(data, MultilingualData):
        languages = published.get("languages", 0)
        if len(data) < languages:
            yield f"the languages with captions are {', '.join(data) or 'none'}"
        # Where languages have different numbers of captions, no single one has a published count.
        each = texts // languages if languages and texts % languages == 0 else 0
        yield from _of_parts({name: _facts({"images": images, "texts": each}, part) for name, part in data.items()})
    elif isinstance(data, SeveralSets):
        counts = {name: {what: published.get(f"{name} {what}", 0) for what in ("images", "classes")} for name in data}
        yield from _of_parts({name: _facts(counts[name], part) for name, part in data.items()})
    elif isinstance(data, HardNegativeData):
        rows = {
            kind: [row for row, kind_of_row in zip(parts[0].rows, data.kinds, strict=True) if kind_of_row == kind]
            for kind in published
        }
        yield from _of_parts({kind: [_repeated_or_last(rows[kind], count)] for kind, count in published.items()})
    else:
        if isinstance(data, RetrievalData):
            names = [data.images.key(row) for row in range(len(data.images))]
            yield _odd("images with another number of captions", names, data.owners.tolist(), texts, images)
        if isinstance(data, RetrievalData | SegmentationData) and 0 < len(data.images) < images:
            names = [data.images.key(row) for row in range(len(data.images))]
            yield _gaps(names, images) or f"the last image is number {len(names):,}, {names[-1]}"
        if isinstance(data, ClassificationData):
            labels, classes = data.labels.tolist(), published.get("classes", 0)
            yield _odd("classes with another number of images", data.classnames, labels, images, classes)
        expected = texts or published.get("pairs", 0)
        yield from (_repeated_or_last(part.rows, expected) for part in parts if expected)


def _of_parts(facts: Mapping[str, Iterable[str]]) -> list[str]:
    """Say each fact once, after the parts of which it is true."""
    names: dict[str, list[str]] = {}
    for part, of_part in facts.items():
        for fact in filter(None, of_part):
            names.setdefault(fact, []).append(part)
    told = [f"{_some(parts)}: {fact}" for fact, parts in names.items()]
    return [*told[:NAMED], *([f"{len(told) - NAMED:,} more facts of parts"] if len(told) > NAMED else [])]


def _odd(what: str, names: Sequence[str], owners: Sequence[int], rows: int, spread: int) -> str:
    """Name those that own another number of rows than most, or none where numbers differ."""
    counted = Counter(owners)
    usual = rows // spread if spread and rows % spread == 0 else 0
    is_usual = usual > 0 and [counted[owner] for owner in range(len(names))].count(usual) > len(names) / 2
    odd = [
        f"{name} ({counted[owner]})"
        for owner, name in enumerate(names)
        if (counted[owner] != usual if is_usual else counted[owner] == 0)
    ]
    return f"{what}: {_some(odd)}" if odd else ""


def _repeated_or_last(rows: Sequence[tuple[str, ...]], expected: int) -> str:
    described = [" ".join([row[0], *(repr(text[:60]) for text in row[1:])]).strip() for row in rows]
    repeated = [row for row, count in Counter(described).items() if count > 1]
    if len(rows) > expected and repeated:
        return f"repeated rows: {_some(repeated)}"
    return f"the last row is number {len(rows):,}, {described[-1]}" if 0 < len(rows) < expected else ""


def _gaps(names: Sequence[str], expected: int) -> str:
    """Name the numbers that are missing in a series of numbered images."""
    matches = [re.fullmatch(r"(.*?)(\d+)", Path(name).stem) for name in names]
    numbered = [(match[1], int(match[2])) for match in matches if match is not None]
    if len(numbered) < len(names) or len({start for start, _ in numbered}) > 1:
        return ""
    numbers = {number for _, number in numbered}
    series = range(min(numbers), max(numbers) + 1)
    # The numbers of some sets, such as those of COCO, are no series.
    missing = [str(number) for number in series if number not in numbers] if len(series) <= expected else []
    return f"numbers without an image: {_some(missing)}" if missing else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
