"""Which rows of a set may make its counts differ from the published ones."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.evaluation.data import ClassificationData, MultilingualData, RetrievalData

# Rows that a message names.
NAMED = 5


def unusual_rows(published: Mapping[str, int], data: Any, folder: Path) -> str:
    """Name the rows of data with other counts than the published ones that stand out.

    These are images and classes with another number of rows than the others or with none, repeated rows if there are
    too many, the last row or image if there are too few, and numbers that are missing among the names of images.

    Args:
        published: The published counts.
        data: What the reader of a set returned.
        folder: The folder that was read, which the names leave out.

    Returns:
        A sentence; empty if nothing stands out.
    """
    facts: list[str] = []
    if isinstance(data, RetrievalData):
        names = [data.images.key(row) for row in range(len(data.images))]
        spread = published.get("texts", 0), published.get("images", 0)
        facts.append(_odd("images with another number of captions", names, data.owners.tolist(), *spread))
        if 0 < len(names) < spread[1]:
            facts.append(_gaps(names, spread[1]) or f"the last image is number {len(names):,}, {names[-1]}")
    if isinstance(data, ClassificationData):
        spread = published.get("images", 0), published.get("classes", 0)
        facts.append(_odd("classes with another number of images", data.classnames, data.labels.tolist(), *spread))
    if not isinstance(data, MultilingualData):
        expected = published.get("texts", published.get("pairs", 0))
        facts += [_repeated_or_last(part.rows, expected) for part in data.parts() if expected and part.rows]
    words = "; ".join(filter(None, facts)).replace(f"{folder}{os.sep}", "")
    return f"What stands out: {words}." if words else ""


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
    return _listed(what, odd)


def _repeated_or_last(rows: Sequence[tuple[str, ...]], expected: int) -> str:
    described = [" ".join([row[0], *(repr(text[:60]) for text in row[1:])]).strip() for row in rows]
    if len(rows) > expected:
        return _listed("repeated rows", [row for row, count in Counter(described).items() if count > 1])
    return f"the last row is number {len(rows):,}, {described[-1]}" if len(rows) < expected else ""


def _gaps(names: Sequence[str], expected: int) -> str:
    """Name the numbers that are missing in a series of numbered images."""
    matches = [re.fullmatch(r"(.*?)(\d+)", Path(name).stem) for name in names]
    found = [(match[1], int(match[2])) for match in matches if match is not None]
    if len(found) < len(names) or len({start for start, _ in found}) > 1:
        return ""
    numbers = {number for _, number in found}
    series = range(min(numbers), max(numbers) + 1)
    # The numbers of some sets, such as those of COCO, are no series.
    missing = [str(number) for number in series if number not in numbers] if len(series) <= expected else []
    return _listed("numbers without an image", missing)


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{what}: {', '.join(names[:NAMED])}{more}" if names else ""
