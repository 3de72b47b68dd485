"""Captions in lines: `NAME.jpg,caption` after a header, as CLIP_benchmark has them, and `NAME#number<TAB>caption`."""

from __future__ import annotations

import re
from pathlib import Path

from llm2clip.evaluation.benchmarks.base import BenchmarkError
from llm2clip.evaluation.benchmarks.files import group_captions, read_lines

# One blank or tab ends the key; all that follows is the caption.
KEY = re.compile(r"(?P<image>[^#\s]+)#(?P<number>\S+)[ \t](?P<caption>.*)")


def read_comma_lines(file: Path) -> dict[str, list[str]]:
    """Read the captions of each image from a header and lines `NAME.jpg,caption`; blank lines are left out.

    A line ends its name at the first `.jpg,`, because captions contain commas.

    Raises:
        BenchmarkError: A line has no `.jpg,`.
    """
    rows = []
    for number, line in enumerate(read_lines(file)[1:], 2):
        stem, comma, caption = line.partition(".jpg,")
        if comma:
            rows.append((f"{stem}.jpg", caption))
        elif line.strip():
            raise BenchmarkError(f"line {number} of {file} is not NAME.jpg,caption: {line!r:.80}.")
    return group_captions(rows)


def read_key_lines(file: Path, kind: str = "") -> dict[str, list[str]]:
    """Read the captions of each image from lines `NAME#number<TAB>caption`; blank lines are left out.

    Names without an ending get `.jpg`.

    Args:
        kind: How the number has to begin, such as `zhm#`; other lines are left out.

    Raises:
        BenchmarkError: A line is something else.
    """
    rows = []
    for number, line in enumerate(read_lines(file), 1):
        match = KEY.fullmatch(line)
        if match is None and line.strip():
            raise BenchmarkError(f"line {number} of {file} is not NAME#number, a tab and a caption: {line!r:.80}.")
        if match is not None and match["number"].startswith(kind):
            rows.append((match["image"] if "." in match["image"] else f"{match['image']}.jpg", match["caption"]))
    return group_captions(rows)
