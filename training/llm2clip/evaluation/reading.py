"""Reading the files of benchmarks: text in UTF-8 with or without a mark, JSON, JSON lines.

What is broken in a row is found where it is used: [`Benchmark.load`] says of which set the file is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm2clip.evaluation.benchmark import BenchmarkError

BLOCK = 1 << 16


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


def read_json(path: Path) -> Any:
    """Read a JSON value.

    Raises:
        BenchmarkError: The file is not valid JSON.
    """
    return _parsed(read_text(path), path)


def read_json_lines(path: Path) -> list[Any]:
    """Read a file with one JSON value per line; blank lines are skipped.

    Raises:
        BenchmarkError: A line is not valid JSON; the message gives its number.
    """
    lines = enumerate(read_lines(path), start=1)
    return [_parsed(line, f"line {number:,} of {path}") for number, line in lines if line.strip()]


def _parsed(text: str, where: str | Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"{where} is not valid JSON, or is cut short: {error}.") from error


def first_json_objects(path: Path, count: int) -> list[Any]:
    """Read the first objects of a JSON array that is too large to be read whole, or all if it has fewer.

    Raises:
        BenchmarkError: The file is cut short or broken before their end.
    """
    decoder, objects = json.JSONDecoder(), list[Any]()
    with path.open(encoding="utf-8-sig") as file:
        rest = file.read(BLOCK).lstrip().removeprefix("[")
        while len(objects) < count:
            rest = rest.lstrip(" \t\r\n,")
            if rest.startswith("]"):
                break
            try:
                item, end = decoder.raw_decode(rest)
            except json.JSONDecodeError as error:
                if not (block := file.read(BLOCK)):
                    raise BenchmarkError(f"item {len(objects)} of {path} is cut short or broken: {error}.") from error
                rest += block
            else:
                objects.append(item)
                rest = rest[end:]
    return objects
