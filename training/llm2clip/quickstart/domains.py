"""Captioned images split by domain: training without one of them, and a test on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from llm2clip.data import load_source
from llm2clip.data.opened_table import open_table
from llm2clip.quickstart.data import QuickstartData

SPLITS = ("train", "validation", "test")


def without_domain(data: QuickstartData, folder: Path) -> QuickstartData:
    """Describe the data set in the folder that [`write_without_domain`] wrote."""
    return replace(data, path=str(folder), train="train", validation="validation", test="test")


def write_without_domain(data: QuickstartData, column: str, held_out: str, folder: Path) -> dict[str, int]:
    """Write the data without a domain, and that domain as a test set; returns the numbers of rows.

    `train` and `validation` are those of the data without the domain, and `test` has the domain's rows of the data's
    validation and test sets.

    Args:
        column: Names the domain of each row.
        held_out: The domain.
        folder: Gets a parquet file for each split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name in SPLITS:
        tables: list[Any] = [
            load_source(data.source(split, data.caption_columns)).select(rows)
            for split, rows in _rows(data, column, held_out, name).items()
        ]
        table = datasets.concatenate_datasets(tables)
        table.to_parquet(folder / f"{name}.parquet")
        counts[name] = len(table)
    return counts


def missing_for_split(data: QuickstartData, column: str, held_out: str) -> str:
    """Say why the data cannot be split in this way; empty if it can."""
    for split in (data.train, data.validation, data.test):
        if column not in open_table(data.path, None, split, None).table.column_names:
            return f"{data.path} has no column {column!r}"
    for name in SPLITS:
        if not any(_rows(data, column, held_out, name).values()):
            kind = f"rows of {held_out!r}" if name == "test" else f"{name} rows of other domains"
            return f"{data.path} has no {kind} in its column {column!r}"
    return ""


def _rows(data: QuickstartData, column: str, held_out: str, name: str) -> dict[str, list[int]]:
    """The rows of a file, by the split of the data that they are from."""
    splits = {"train": [data.train], "validation": [data.validation], "test": [data.validation, data.test]}
    found = {}
    for split in splits[name]:
        domains = open_table(data.path, None, split, None).select([column])[column]
        found[split] = [row for row, domain in enumerate(domains) if (domain == held_out) == (name == "test")]
    return found
