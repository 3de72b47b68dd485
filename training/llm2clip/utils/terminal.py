"""What is printed of data that others wrote: captions, file names and messages that quote them."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# What a terminal obeys instead of showing it (escape sequences, in 7 and 8 bits), what turns the direction of the text
# around it, and what no encoding has. Line feed and tab are layout.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Write out the characters that a terminal would obey, such as `\\u001b`; JSON stays the same JSON."""
    return OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class PrintableFormatter(logging.Formatter):
    """Formats log records, whose messages quote data, without the characters that a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; see [`printable`]."""
        return printable(super().format(record))


class PrintableStream:
    """A text stream that writes out the characters that a terminal would obey; see [`printable`]."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """Let nothing that libraries print, tracebacks that quote strangers too, steer the terminal."""
    with (
        contextlib.redirect_stdout(PrintableStream(sys.stdout)),
        contextlib.redirect_stderr(PrintableStream(sys.stderr)),
    ):
        yield
