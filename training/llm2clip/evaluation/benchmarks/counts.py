"""The counts of a set against the published ones, and which of its rows may make the difference."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.data import BenchmarkData, BenchmarkImages, DataPart

# Rows, images or classes that a message names.
NAMED = 5
# Files that can hold all rows of a set.
TABLES = (".json", ".jsonl", ".jsonlines", ".csv", ".tsv", ".txt", ".token")
NUMBERED = re.compile(r"(.*?)(\d+)")

Counts = Mapping[str, int]


def check_counts(benchmark: Benchmark, folder: Path, data: BenchmarkData, allow: bool) -> list[str]:
    """Compare the counts of what a reader returned with the published ones.

    Args:
        folder: The folder that was read.
        data: What the reader returned.
        allow: Return the differences instead of raising.

    Returns:
        The differences in words; empty if there are none.

    Raises:
        BenchmarkError: A count differs. The message says by how much, and which rows are unusual.
    """
    counts = data.counts()
    differing = {
        name: (counts.get(name, 0), count) for name, count in benchmark.counts.items() if counts.get(name, 0) != count
    }
    if differing and not allow:
        differences = [
            f"{found:,} {name} instead of {count:,} ({abs(count - found):,} too {'few' if found < count else 'many'})"
            for name, (found, count) in differing.items()
        ]
        sentences = [
            f"{benchmark.title} has {', '.join(differences)}: its numbers could not be compared with published ones.",
            describe_rows(benchmark, folder, data),
            "With --allow-counts it is measured all the same, and the result says so.",
        ]
        raise BenchmarkError(" ".join(filter(None, sentences)))
    return [f"{found:,} {name} instead of {count:,}" for name, (found, count) in differing.items()]


def describe_rows(benchmark: Benchmark, folder: Path, data: BenchmarkData) -> str:
    """Say in a sentence which rows of data with other counts than the published ones are unusual.

    What its parts can tell: images with another number of captions than the others, repeated rows, numbers that are
    missing in the names of images, the last row if there are too few, languages and classes without any.

    Returns:
        The sentence; empty if nothing is unusual.
    """
    published, parts = benchmark.counts, data.parts()
    facts = [_listed(part.name, list(dict.fromkeys(part.absent))) for part in parts]
    facts.append(_unusual_owners(published, [part for part in parts if part.owners]))
    for part in parts:
        if part.count and part.columns and "languages" not in part.per:
            facts += _of_rows(part.name, [_described(row) for row in part.rows], published.get(part.count, 0))
    images = next((part.images for part in parts if part.images is not None), None)
    if isinstance(images, BenchmarkImages):
        facts += _of_images(images, published.get("images", 0))
    # Images are named by their paths in the folder.
    words = "; ".join(filter(None, facts)).replace(f"{folder}{os.sep}", "")
    return f"In {_place(benchmark, folder)}: {words}." if words else ""


def _place(benchmark: Benchmark, folder: Path) -> Path:
    """Return the file of the rows if the set needs only one, or else the folder."""
    files = benchmark.located(folder)
    return files[0] if len(files) == 1 and files[0] is not None and files[0].suffix in TABLES else folder


def _unusual_owners(published: Counts, parts: Sequence[DataPart]) -> str:
    """Name the images or classes that have not as many rows as the published counts let expect, and their numbers."""
    if not parts:
        return ""
    numbers: list[tuple[str, int]] = []
    for part in parts:
        rows = Counter(row[0] for row in part.rows)
        numbers += [(f"{part.name} {owner}" if len(part.per) > 1 else owner, rows[owner]) for owner in part.owners]
    first, of_what = parts[0], "captions" if parts[0].count == "texts" else parts[0].count
    spread = math.prod(published.get(name, 0) for name in first.per)
    usual, rest = divmod(published.get(first.count, 0), spread) if spread else (0, 0)
    is_usual = [number for _, number in numbers].count(usual) > len(numbers) / 2
    # Classes of many sets differ in size, though their mean is a whole number; some languages have ragged captions.
    if usual == 0 or (first.per == ("classes",) and not is_usual) or (len(first.per) > 1 and rest):
        usual, rest = 1, 1
    odd = [f"{name} ({number})" for name, number in numbers if (number < usual if rest else number != usual)]
    if rest == 0:
        return _listed(f"{first.per[0]} with another number of {of_what} than {usual}", odd)
    if usual > 1:
        return _listed(f"{first.per[0]} with fewer than {usual} {of_what}", odd)
    return _listed(f"{first.per[0]} without {of_what}", [name.removesuffix(" (0)") for name in odd])


def _of_images(images: BenchmarkImages, expected: int) -> list[str]:
    if images.names is None and not (len(images) and isinstance(images.images[0], Path)):
        return []
    names = [images.key(row) for row in range(len(images))]
    gaps = _gaps(names, expected)
    if gaps:
        return [_repeated("images", names), _listed("numbers without an image", gaps)]
    return _of_rows("images", names, expected)


def _of_rows(what: str, rows: Sequence[str], expected: int) -> list[str]:
    """Name rows that are repeated if there are too many, and the last one if there are too few."""
    if len(rows) >= expected:
        return [_repeated(what, rows)] if len(rows) > expected > 0 else []
    return [f"the last of the {what} is number {len(rows):,}, {rows[-1]}"] if rows else []


def _repeated(what: str, rows: Sequence[str]) -> str:
    places: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        places.setdefault(row, []).append(f"{number:,}")
    return _listed(
        f"repeated {what}",
        [f"{row} (numbers {', '.join(numbers[:NAMED])})" for row, numbers in places.items() if len(numbers) > 1],
    )


def _gaps(names: Sequence[str], expected: int) -> list[str]:
    """Return the names that are missing in a numbered series, if it has no more members than are expected."""
    matches = [match for match in (NUMBERED.fullmatch(Path(name).stem) for name in names) if match is not None]
    is_series = len(matches) == len(names) and len({match[1] for match in matches}) == 1
    if not is_series or len(names) >= expected:
        return []
    numbers = {int(match[2]) for match in matches}
    whole = range(min(numbers), max(numbers) + 1)
    return [str(number) for number in whole if number not in numbers] if len(whole) <= expected else []


def _described(row: Sequence[str]) -> str:
    key, *texts = row
    quoted = " and ".join(f"{text!r}" if len(text) <= 60 else f"{text[:60] + '...'!r}" for text in texts)
    return f"{key} {quoted}" if key else quoted


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{what}: {', '.join(names[:NAMED])}{more}" if names else ""
