"""Rows that cannot be used: what is done with them, and the log of those that training skipped."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from llm2clip.files.library_errors import wrap_read_errors

logger = logging.getLogger(__name__)

# What to do with a damaged image or a row without caption.
OnError = Literal["raise", "skip"]
NO_EMBEDDING = "its caption has no stored embedding"
# Rows that a message names.
SHOWN = 20


class SkippedSample(NamedTuple):
    """A row that cannot be used, and why."""

    key: str
    reason: str


def unusable_batch_error(skipped: Sequence[SkippedSample]) -> ValueError:
    """Make the error of a batch of which every row is skipped."""
    shown = "; ".join(f"{key}: {reason}" for key, reason in skipped[:SHOWN])
    more = f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    return ValueError(
        f"none of the {len(skipped)} rows of a batch can be used ({shown}{more}); mend or remove these rows, or raise "
        "the batch size."
    )


class SkipLog:
    """Log of skipped rows: a file with one JSON line of key and reason per row.

    An existing file is continued, so that a resumed run does not list a row twice. Each process needs its own file,
    which the first entry creates.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._known: set[str] | None = None
        self._unreported: list[str] = []

    @property
    def _keys(self) -> set[str]:
        # On first use, since a run that starts anew does not read the file of another one.
        if self._known is None:
            content = self.path.read_bytes() if self.path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # the last line is incomplete: the run was killed
                os.truncate(self.path, len(whole))
            with wrap_read_errors(self.path, ValueError):
                self._unreported = [str(json.loads(line)["key"]) for line in whole.splitlines()]
            self._known = set(self._unreported)
        return self._known

    def open(self, continued: bool) -> None:
        """Begin a run: continue the file, or delete that of another run."""
        if not continued:
            self.path.unlink(missing_ok=True)
        self._known, self._unreported = None, []

    def add(self, skipped: Iterable[tuple[str, str]]) -> None:
        """Append the (key, reason) pairs with a new key."""
        new = dict[str, str]()
        for key, reason in skipped:
            if key not in self._keys:
                new.setdefault(key, reason)
        if not new:
            return
        if not self._keys:
            logger.warning("Skipping rows that cannot be used; they are listed in %s.", self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for key, reason in new.items():
                file.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")
        self._keys.update(new)
        self._unreported += new

    def take_new(self) -> list[str]:
        """Return the keys that were added since the last call; at first, those of the existing file too.

        Another process reads a row in another epoch, and lists it in its own file: only the keys of all processes
        together say how many rows there are.
        """
        _ = self._keys
        taken, self._unreported = self._unreported, []
        return taken
