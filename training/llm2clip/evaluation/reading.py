"""Reading the files of benchmarks: text in UTF-8 with or without a mark, JSON, JSON lines.

Every broken file or row is a [`BenchmarkError`] that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.utils.logs import shortened

BLOCK = 1 << 16
# Characters of the end of what may be cut short, in messages.
END = 80


def read_text(path: Path) -> str:
    """Read a text file in UTF-8; a byte order mark is dropped and line ends become newlines.

    Raises:
        BenchmarkError: The file is not UTF-8, or is cut short within a character.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is not UTF-8, or is cut short: {error}.") from error


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file without their ends; only newlines end a line, not the other marks of Unicode."""
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BenchmarkError: The file is not valid JSON, or another value.
    """
    return _parsed_object(read_text(path), path)


def read_json_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON array of objects.

    Raises:
        BenchmarkError: The file is not valid JSON, or another value.
    """
    return json_rows(_parsed(read_text(path), path), path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line; blank lines are skipped.

    Raises:
        BenchmarkError: A line is not a JSON object; the message gives its number.
    """
    lines = enumerate(read_lines(path), start=1)
    return [_parsed_object(line, f"line {number:,} of {path}") for number, line in lines if line.strip()]


def _parsed(text: str, place: str | Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchmarkError(
            f"{place} is not valid JSON, or is cut short: {error}; it ends {text[-END:]!r}."
        ) from error


def _parsed_object(text: str, place: str | Path) -> dict[str, Any]:
    value = _parsed(text, place)
    if not isinstance(value, dict):
        raise BenchmarkError(f"{place} is not a JSON object.")
    return value


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
