"""The counts of a set against the published ones, and which of its rows may make the difference."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.data import (
    BenchmarkImages,
    CaptionPairData,
    ClassificationData,
    GradedData,
    HardNegativeData,
    PairData,
    RetrievalData,
    counts_of,
)
from llm2clip.evaluation.benchmarks.encoded_images import EncodedImages

# Rows, images or classes that a message names.
NAMED = 5
# Files that can hold all rows of a set.
TABLES = (".json", ".jsonl", ".jsonlines", ".csv", ".tsv", ".txt", ".token")
NUMBERED = re.compile(r"(.*?)(\d+)")

Counts = Mapping[str, int]


def check_counts(benchmark: Benchmark, folder: Path, data: Any, allow: bool) -> list[str]:
    """Compare the counts of what a reader returned with the published ones.

    Args:
        folder: The folder that was read.
        data: What the reader returned.
        allow: Return the differences instead of raising.

    Returns:
        The differences in words; empty if there are none.

    Raises:
        BenchmarkError: A count differs. The message says by how much, in which file, and which rows are unusual.
    """
    counts = counts_of(data)
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


def describe_rows(benchmark: Benchmark, folder: Path, data: Any) -> str:
    """Say in a sentence which rows of data with other counts than the published ones are unusual.

    What each kind of data can tell: images with another number of captions than the others, repeated rows, numbers
    that are missing in the names of images, the last row if there are too few, languages and classes without any.

    Returns:
        The sentence; empty if nothing is unusual.
    """
    if isinstance(data, Mapping):
        facts = _of_languages(benchmark, folder, data)
    else:
        facts = _of_data(benchmark.counts, folder, data)
    facts = [fact for fact in facts if fact]
    return f"In {_place(benchmark, folder, data)}: {'; '.join(facts)}." if facts else ""


def _place(benchmark: Benchmark, folder: Path, data: Any) -> Path:
    """Return the file of the rows if all are in one, or else the folder."""
    found = next((path for marker in benchmark.forms(folder) for path in sorted(folder.glob(marker))), folder)
    if found.suffix not in TABLES or any((folder / marker).is_file() for marker in benchmark.more_markers):
        return folder
    # A file of fewer bytes than there are rows holds one of them, or only says how many there are.
    return found if found.stat().st_size >= max(counts_of(data).values(), default=0) else folder


def _of_languages(benchmark: Benchmark, folder: Path, data: Mapping[str, RetrievalData]) -> list[str]:
    published = benchmark.counts
    usual, exactly = _usual(published, "texts", "images", "languages")
    numbers = [
        (f"{language} {name}", number)
        for language, part in data.items()
        for name, number in _captions_by_image(folder, part)
    ]
    # Where images have various numbers of captions, only one without any is surely wrong.
    facts = [
        _listed("languages without a caption", [name for name in benchmark.languages if name not in data]),
        _unusual("images", "captions", numbers, usual if exactly else 1, exactly),
    ]
    images = max((part.images for part in data.values()), key=len, default=BenchmarkImages([]))
    return facts + _of_images(published, folder, images)


def _of_data(published: Counts, folder: Path, data: Any) -> list[str]:
    facts: list[str] = []
    if isinstance(data, GradedData):
        facts.append(_listed("judged pairs of what is not there", list(dict.fromkeys(data.outside))))
    if isinstance(data, RetrievalData):
        facts += _of_captions(published, folder, data)
    elif isinstance(data, ClassificationData):
        facts.append(_of_classes(published, folder, data))
    elif isinstance(data, HardNegativeData):
        names = _names(folder, data.images)
        for kind in published:
            rows = zip(data.kinds, data.owners.tolist(), data.right, data.wrong, strict=True)
            found = [f"{names[owner]} {_quoted(*texts)}" for one, owner, *texts in rows if one == kind]
            facts += _of_rows(f"{kind} rows", found, published[kind])
    elif isinstance(data, PairData):
        usual, exactly = _usual(published, "pairs", "kinds")
        facts += _of_rows("pairs", _paired(data.texts[::2], data.texts[1::2]), published.get("pairs", 0))
        facts.append(_unusual("kinds", "pairs", Counter(data.kinds).items(), usual, exactly))
    elif isinstance(data, CaptionPairData):
        facts += _of_rows("pairs", _paired(data.queries, data.targets), published.get("pairs", 0))
    images = getattr(data, "images", None)
    return facts + (_of_images(published, folder, images) if isinstance(images, BenchmarkImages) else [])


def _of_captions(published: Counts, folder: Path, data: RetrievalData) -> list[str]:
    usual, exactly = _usual(published, "texts", "images")
    names = _names(folder, data.images)
    rows = [f"{names[owner]} {_quoted(text)}" for owner, text in zip(data.owners.tolist(), data.texts, strict=True)]
    unusual = _unusual("images", "captions", _captions_by_image(folder, data), usual, exactly)
    return [unusual, *_of_rows("captions", rows, published.get("texts", 0))]


def _of_classes(published: Counts, folder: Path, data: ClassificationData) -> str:
    numbers = torch.bincount(data.labels, minlength=len(data.classnames)).tolist()
    usual, exactly = _usual(published, "images", "classes")
    # Classes of many sets differ in size, though their mean is a whole number.
    if numbers.count(usual) <= len(numbers) / 2:
        usual, exactly = 1, False
    names = list(data.classnames)
    if not isinstance(data.images.images, EncodedImages):
        for label, image in zip(data.labels.tolist(), data.images.images, strict=True):
            if isinstance(image, Path):
                names[label] = f"{data.classnames[label]} in {os.path.relpath(image.parent, folder)}"
    return _unusual("classes", "images", zip(names, numbers, strict=True), usual, exactly)


def _of_images(published: Counts, folder: Path, images: BenchmarkImages) -> list[str]:
    if images.names is None and not (len(images) and isinstance(images.images[0], Path)):
        return []
    names = _names(folder, images)
    gaps = _gaps(names, published.get("images", 0))
    if gaps:
        return [_repeated("images", names), _listed("numbers without an image", gaps)]
    return _of_rows("images", names, published.get("images", 0))


def _of_rows(what: str, rows: Sequence[str], expected: int) -> list[str]:
    """Name rows that are repeated if there are too many, and the last one if there are too few."""
    if not expected:
        return []
    if len(rows) >= expected:
        return [_repeated(what, rows)] if len(rows) > expected else []
    return [f"the last of the {what} is number {len(rows):,}, {rows[-1]}"] if rows else []


def _repeated(what: str, rows: Sequence[str]) -> str:
    places: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        places.setdefault(row, []).append(f"{number:,}")
    return _listed(
        f"repeated {what}",
        [f"{row} (numbers {', '.join(numbers[:NAMED])})" for row, numbers in places.items() if len(numbers) > 1],
    )


def _usual(published: Counts, what: str, *per: str) -> tuple[int, bool]:
    """Return how many there are of `what` in each of the parts, rounded down, and whether it is a whole number.

    At least one is assumed where counts are not published.
    """
    parts = math.prod(published.get(name, 0) for name in per)
    if not parts or what not in published:
        return 1, False
    return published[what] // parts, published[what] % parts == 0


def _unusual(what: str, of_what: str, numbers: Iterable[tuple[str, int]], usual: int, exactly: bool) -> str:
    """Name the parts of which there are not as many as usual, and how many there are."""
    odd = [f"{name} ({number})" for name, number in numbers if (number != usual if exactly else number < usual)]
    if exactly:
        return _listed(f"{what} with another number of {of_what} than {usual}", odd)
    if usual > 1:
        return _listed(f"{what} with fewer than {usual} {of_what}", odd)
    return _listed(f"{what} without {of_what}", [name.removesuffix(" (0)") for name in odd])


def _gaps(names: Sequence[str], expected: int) -> list[str]:
    """Return the names that are missing in a numbered series, if it has no more members than are expected."""
    matches = [match for match in (NUMBERED.fullmatch(Path(name).stem) for name in names) if match is not None]
    is_series = len(matches) == len(names) and len({match[1] for match in matches}) == 1
    if not is_series or len(names) >= expected:
        return []
    numbers = {int(match[2]) for match in matches}
    whole = range(min(numbers), max(numbers) + 1)
    return [str(number) for number in whole if number not in numbers] if len(whole) <= expected else []


def _captions_by_image(folder: Path, data: RetrievalData) -> list[tuple[str, int]]:
    numbers = torch.bincount(data.owners, minlength=len(data.images)).tolist()
    return list(zip(_names(folder, data.images), numbers, strict=True))


def _names(folder: Path, images: BenchmarkImages) -> list[str]:
    """Names of images, paths relative to the folder of the set."""
    return [images.key(row).removeprefix(f"{folder}{os.sep}") for row in range(len(images))]


def _paired(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    return [_quoted(*pair) for pair in zip(texts, others, strict=True)]


def _quoted(*texts: str) -> str:
    return " and ".join(f"{text!r}" if len(text) <= 60 else f"{text[:60] + '...'!r}" for text in texts)


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{what}: {', '.join(names[:NAMED])}{more}" if names else ""
