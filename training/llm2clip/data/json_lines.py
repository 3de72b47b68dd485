"""A guard for the reader of JSON in `datasets`: pyarrow ends the process (SIGSEGV) over a row that is `null`."""

from __future__ import annotations

import re
from typing import IO, Any

import pyarrow as pa
import pyarrow.json
from datasets.packaged_modules.json import json as reader

# A line of JSON lines that is null; as a value within a row it does no harm.
NULL_ROW = re.compile(rb"^[ \t]*null[ \t\r]*$", re.MULTILINE)


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
        return pyarrow.json.read_json(pa.BufferReader(content), **options)


def guard_json() -> None:
    """Let `datasets` refuse such rows, in this process."""
    reader.paj = _GuardedJson()
