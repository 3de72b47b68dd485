"""Reading the files of benchmarks: text in UTF-8 with or without a mark, JSON, JSON lines, images by their names.

Every broken file or row is a [`BenchmarkError`] that names it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

from llm2clip.evaluation.benchmarks.base import BenchmarkError
from llm2clip.evaluation.benchmarks.data import BenchmarkImages, RetrievalData
from llm2clip.utils.logs import shortened

BLOCK = 1 << 16
# Characters of the end of a file that is cut short, in messages.
END = 80


def read_text(path: Path) -> str:
    """Read a text file in UTF-8; a byte order mark is dropped and line ends become newlines.

    Raises:
        BenchmarkError: The file is not UTF-8, or is cut short within a character.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            text = error.object.decode(errors="ignore")
            raise BenchmarkError(f"{_cut_short(path, text)} Or it is not UTF-8.") from error
        raise BenchmarkError(f"{path} is not UTF-8: {error}.") from error


def _cut_short(path: Path, text: str) -> str:
    return f"{path} is cut short: it ends after {len(text):,} characters with {text[-END:]!r}."


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file without their ends; only newlines end a line, not the other marks of Unicode."""
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BenchmarkError: The file is not valid JSON, or another value.
    """
    value = _read_json_value(path)
    if not isinstance(value, dict):
        raise BenchmarkError(f"{path} is not a JSON object.")
    return value


def read_json_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON array of objects.

    Raises:
        BenchmarkError: The file is not valid JSON, or another value.
    """
    return json_rows(_read_json_value(path), path)


def _read_json_value(path: Path) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # The value ended where the text ends, or the text lacks the bracket that would end it.
        if error.pos >= len(text.rstrip()) or not text.rstrip().endswith(("]", "}")):
            raise BenchmarkError(_cut_short(path, text)) from error
        raise BenchmarkError(f"{path} is not valid JSON: {error}.") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line; blank lines are skipped.

    Raises:
        BenchmarkError: A line is not a JSON object; the message gives its number.
    """
    rows, lines = [], read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.rstrip().endswith("}"):
                raise BenchmarkError(
                    f"{path} is cut short in line {number:,}, its last, which ends with {line[-END:]!r}."
                ) from error
            raise BenchmarkError(f"line {number} of {path} is not valid JSON: {error}.") from error
        if not isinstance(row, dict):
            raise BenchmarkError(f"line {number} of {path} is not a JSON object.")
        rows.append(row)
    return rows


def stream_json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a JSON array one by one; the file is read no further than the objects that are taken.

    Raises:
        BenchmarkError: The file is not an array of objects, is cut short, or an object is broken.
    """
    decoder, taken = json.JSONDecoder(), 0
    with path.open(encoding="utf-8-sig") as file:
        rest = _read_block(file, path).lstrip()
        if not rest.startswith("["):
            raise BenchmarkError(f"{path} is not a JSON array.")
        rest = rest[1:]
        while True:
            rest = rest.lstrip(" \t\r\n,")
            if rest.startswith("]"):
                return
            try:
                item, end = decoder.raw_decode(rest)
            except json.JSONDecodeError as error:
                block = _read_block(file, path)
                if not block:
                    raise BenchmarkError(f"item {taken} of {path} is cut short or broken: {error}.") from error
                rest += block
                continue
            if not isinstance(item, dict):
                raise BenchmarkError(f"item {taken} of {path} is not a JSON object.")
            rest, taken = rest[end:], taken + 1
            yield item


def _read_block(file: TextIO, path: Path) -> str:
    try:
        return file.read(BLOCK)
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is not UTF-8, or is cut short: {error}.") from error


def text_field(row: Mapping[str, Any], name: str, place: str) -> str:
    """Return a text of a row, as it stands.

    Args:
        place: What the row is, in messages, such as `line 3 of captions.jsonl`.

    Raises:
        BenchmarkError: The row has no such field, or it is not a text.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise BenchmarkError(f"{place} has no text {name!r}, but {shortened(list(row))}.")
    return value


def texts_field(row: Mapping[str, Any], name: str, place: str) -> list[str]:
    """Return a list of texts of a row, as they stand; see [`text_field`]."""
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BenchmarkError(f"{place} has no list of texts {name!r}, but {shortened(list(row))}.")
    return value


def json_rows(value: Any, place: str | Path) -> list[dict[str, Any]]:
    """Return `value` if it is a list of JSON objects.

    Args:
        place: Where it is from, in messages.

    Raises:
        BenchmarkError: It is something else.
    """
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BenchmarkError(f"{place} is not a list of JSON objects.")
    return value


def first_file(folder: Path, names: Sequence[str]) -> Path:
    """Return the first of `names` that exists below a folder.

    Raises:
        BenchmarkError: None exists; the message names all.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise BenchmarkError(f"{folder} has no file {' or '.join(names)}.")


def group_captions(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Collect the captions of each image from pairs of image and caption, in order of first appearance."""
    captions: dict[str, list[str]] = {}
    for image, caption in rows:
        captions.setdefault(image, []).append(caption)
    return captions


def find_images(title: str, folder: Path, names: Sequence[str], places: Sequence[str] = ()) -> BenchmarkImages:
    """Find images by their paths in an annotation file.

    Archives are unpacked in many ways: an image that is not at its path is looked for in some folders, and then by its
    file name anywhere below `folder`.

    Args:
        title: The benchmark, in messages.
        names: Paths relative to `folder`.
        places: Folders, relative to `folder`, in which the file name alone is tried.

    Raises:
        BenchmarkError: Images are missing, or a file name is found twice; the message names them.
    """
    found = [_at_a_place(folder, name, places) for name in names]
    if None in found:
        below = _files_by_name(folder, {Path(name).name for name, path in zip(names, found, strict=True) if not path})
        twice = [f"{name} ({paths[0]}, {paths[1]})" for name, paths in below.items() if len(paths) > 1]
        if twice:
            raise BenchmarkError(f"{title}: several files have the name of one image: {shortened(twice)}.")
        found = [
            path or next(iter(below.get(Path(name).name, [])), folder / name)
            for name, path in zip(names, found, strict=True)
        ]
    return BenchmarkImages([path for path in found if path is not None], names).require_files(title)


def captions_data(
    title: str,
    folder: Path,
    captions: Iterable[tuple[str, Sequence[str]]],
    places: Sequence[str] = (),
    first: int | None = None,
) -> RetrievalData:
    """Find the images of captions.

    Args:
        title, folder, places: See [`find_images`].
        captions: Path and captions of each image.
        first: Captions of each image that are taken; None for all.

    Raises:
        BenchmarkError: There is no caption, or images are missing.
    """
    rows = list(captions)
    if not rows:
        raise BenchmarkError(f"{title}: the file of captions below {folder} is empty.")
    images = find_images(title, folder, [name for name, _ in rows], places)
    return RetrievalData.from_captions(images, [texts[:first] for _, texts in rows])


@cache
def class_data(name: str) -> dict[str, Any]:
    """Return names of classes and prompt templates from the file `class_data/NAME.json` of the package."""
    file = resources.files("llm2clip.evaluation") / "class_data" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def _at_a_place(folder: Path, name: str, places: Sequence[str]) -> Path | None:
    candidates = [folder / name, *(folder / place / Path(name).name for place in places)]
    return next((path for path in candidates if path.is_file()), None)


def _files_by_name(folder: Path, wanted: set[str]) -> dict[str, list[Path]]:
    """Return the files below a folder that have one of the names."""
    found: dict[str, list[Path]] = {}
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in wanted.intersection(names):
            found.setdefault(name, []).append(Path(root) / name)
    return found
