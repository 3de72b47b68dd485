"""Sources of pairs of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2clip.data import PairSource
from tests.builders.tables import write_table

from .conftest import CONCEPTS, GLOSSES


def glosses(**fields: Any) -> PairSource:
    return PairSource(GLOSSES, anchor_column="lemmas", positive_column="gloss", **fields)


def concepts(**fields: Any) -> PairSource:
    return PairSource(CONCEPTS, caption_columns=["caption", "keywords", "caption_de"], **fields)


def table_source(folder: Path, columns: dict[str, list[Any]], name: str = "pairs", **fields: Any) -> PairSource:
    return PairSource(write_table(folder / f"{name}.parquet", columns), **fields)


def plain_source(folder: Path, columns: dict[str, list[Any]], **fields: Any) -> PairSource:
    """Pairs of the columns `q` and `p`."""
    return table_source(folder, columns, anchor_column="q", positive_column="p", **fields)
