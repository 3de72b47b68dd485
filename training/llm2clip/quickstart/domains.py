"""Captioned images split by domain: training without one of them, and a test on it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from llm2clip.data import CaptionSource, load_source
from llm2clip.data.opened_table import open_table
from llm2clip.quickstart.data import QuickstartData

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


class DomainSplit:
    """The data without one domain, and that domain as a test set, as parquet files in a folder.

    `train` and `validation` are those of the data without the domain, and `test` has the domain's rows of the data's
    validation and test sets.
    """

    def __init__(self, data: QuickstartData, column: str, held_out: str, folder: Path) -> None:
        self.data, self.column, self.held_out, self.folder = data, column, held_out, folder

    def missing(self) -> str:
        """Say why the data cannot be split in this way; empty if it can."""
        for split in self._parts().values():
            for part in split:
                if self.column not in open_table(self.data.path, None, part, None).table.column_names:
                    return f"{self.data.path} has no column {self.column!r}"
        for name, parts in self._parts().items():
            if not any(self._rows(name, part) for part in parts):
                kind = f"rows of {self.held_out!r}" if name == "test" else f"{name} rows of other domains"
                return f"{self.data.path} has no {kind} in its column {self.column!r}"
        return ""

    def write(self) -> dict[str, int]:
        """Write the three files; returns their numbers of rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        counts = {}
        for name, parts in self._parts().items():
            tables: list[Any] = [
                load_source(self.data.source(part, self.data.caption_columns)).select(self._rows(name, part))
                for part in parts
            ]
            table = datasets.concatenate_datasets(tables)
            table.to_parquet(self._file(name))
            counts[name] = len(table)
        return counts

    def source(self, name: str, caption_columns: list[str]) -> CaptionSource:
        """Return `train`, `validation` or `test` with the captions of some columns."""
        path, column = str(self._file(name)), self.data.image_column
        return CaptionSource(path, split=name, image_column=column, caption_columns=caption_columns)

    def _parts(self) -> dict[str, Iterable[str]]:
        """The splits of the data that each file takes rows from."""
        data = self.data
        measured = dict.fromkeys((data.validation, data.test))
        return {"train": [data.train], "validation": [data.validation], "test": [*measured]}

    def _rows(self, name: str, split: str) -> list[int]:
        table = open_table(self.data.path, None, split, None).table
        domains = table.select_columns([self.column])[self.column]
        return [row for row, domain in enumerate(domains) if (domain == self.held_out) == (name == "test")]

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.parquet"
