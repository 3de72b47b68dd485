"""The readers that are fuzzed, and good files for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz import data, models, stores


class Door(NamedTuple):
    """A reader of files.

    Attributes:
        make: Writes good files, a folder for each sample.
        read: Returns the calls that read the files of a folder.
        share: Its share of the time.
        limit: Seconds for an input.
        unchanged: Patterns of the names of files that are not damaged.
        names: What a message may name besides the files.
        several: Whether some readers are for some samples; otherwise all of them read the good files.
    """

    name: str
    make: Callable[[Path], Any]
    read: Callable[[Path], data.Doors]
    share: float = 1.0
    limit: float = 20.0
    unchanged: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    several: bool = False


DOORS = (
    Door("images", data.make_images, data.read_image),
    Door("tars", data.make_tars, data.read_tar, several=True),
    Door("tables", data.make_tables, data.read_table, share=2, limit=60),
    Door("recipes", data.make_recipes, data.read_recipe, names=data.SETTINGS),
    Door("lists", stores.make_lists, stores.read_lists, several=True),
    Door("caches", stores.make_caches, stores.read_cache, several=True),
    Door("sidecars", stores.make_sidecars, stores.read_sidecars, unchanged=("*.parquet",)),
    Door("indexes", stores.make_indexes, stores.read_index, share=2, limit=60),
    Door("checkpoints", models.make_checkpoints, models.read_checkpoint, share=2, limit=60, unchanged=("llm/*",)),
    Door("language_models", models.make_language_models, models.read_language_model, limit=60),
)
