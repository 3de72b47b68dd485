"""A guard for the reader of JSON in `datasets`: pyarrow ends the process (SIGSEGV) over some rows.

These are rows that are `null`, and values in values in values, for each of which it takes a part of the stack.
"""

from __future__ import annotations

import re
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.json
from datasets.packaged_modules.json import json as reader

# A line of JSON lines that is null; as a value within a row it does no harm.
NULL_ROW = re.compile(rb"^[ \t]*null[ \t\r]*$", re.MULTILINE)
STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
# Values in values; the stack ends after some ten thousand.
MAX_DEPTH = 1000


class _GuardedJson:
    """`pyarrow.json`, whose `read_json` raises an error where it would crash."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pyarrow.json, name)

    @staticmethod
    def read_json(file: IO[bytes], **options: Any) -> pa.Table:
        """Read JSON lines; see `pyarrow.json.read_json`."""
        content = file.read()
        if b"null" in content and (found := NULL_ROW.search(content)) is not None:
            row = content.count(b"\n", 0, found.start())
            raise pa.ArrowInvalid(f"JSON parse error: a row is null, and not an object, in row {row}")
        # Only values that nest, or strings, have more of these than rows.
        if (
            content.count(b"{") + content.count(b"[") - content.count(b"\n") > MAX_DEPTH
            and _depth(content) > MAX_DEPTH
        ):
            raise pa.ArrowInvalid(f"JSON parse error: a value is nested more than {MAX_DEPTH:,} deep")
        return pyarrow.json.read_json(pa.BufferReader(content), **options)


def _depth(content: bytes) -> int:
    """Return how deep the values of some lines are nested."""
    depth = _brackets_open(content)
    return _brackets_open(STRING.sub(b"", content)) if depth > MAX_DEPTH else depth


def _brackets_open(content: bytes) -> int:
    """Return the largest number of brackets that are open at a time, those in strings included."""
    characters = np.frombuffer(content, np.uint8)
    steps = np.isin(characters, (ord("{"), ord("["))).astype(np.int32)
    steps -= np.isin(characters, (ord("}"), ord("]")))
    opened = np.cumsum(steps)
    return int((opened - np.minimum.accumulate(opened)).max(initial=0))


def guard_json() -> None:
    """Let `datasets` refuse such rows, in this process."""
    reader.paj = _GuardedJson()
