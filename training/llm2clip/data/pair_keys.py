"""The keys of the rows of a table of text pairs, computed some rows at a time from whole columns."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np

from llm2clip.data.captioned_images import caption_ids, column_texts, value_texts
from llm2clip.data.opened_table import SourceError
from llm2clip.data.sampling import stable_seed
from llm2clip.data.sources import column_value

# A few thousand texts as Python objects at a time.
BATCH_ROWS = 1000


class KeyColumns(NamedTuple):
    """The columns that keys are computed from.

    Attributes:
        own: Columns of the texts of a pair.
        each_needed: Whether a usable row has a text in each of them; otherwise two different texts are enough.
        negative: Column of the hard negatives. Every usable row has one that differs from the texts of its pair.
        group: Rows with the same value in this column share a key.
    """

    own: Sequence[str]
    each_needed: bool
    negative: str | None = None
    group: str | None = None


class Keys(NamedTuple):
    """The keys of some rows: (n,) positions of the usable ones, and of these the keys and how many each row has."""

    rows: np.ndarray
    own: np.ndarray
    own_counts: np.ndarray
    negative: np.ndarray
    negative_counts: np.ndarray


def pair_keys(table: datasets.Dataset, columns: KeyColumns, path: str) -> dict[str, np.ndarray]:
    """Find the usable rows of a table and their keys, the [`caption_id`] of each text and a hash of the group.

    Args:
        path: Name of the table in messages.

    Returns:
        int64 arrays: `rows`, (n,) positions of the usable rows; `own_keys` and `own_starts`, where the sorted keys of
        row i are `own_keys[own_starts[i]:own_starts[i + 1]]`; `negative_keys` and `negative_starts`, the same for the
        hard negatives.

    Raises:
        SourceError: A column of texts contains something else; the message names the first such row.
    """
    # The arrays grow in place, and the results are views of them: no second copy.
    found = {name: array("q") for name in ("rows", "own_keys", "own_starts", "negative_keys", "negative_starts")}
    found["own_starts"].append(0)
    found["negative_starts"].append(0)
    position = 0
    for batch in table.iter(BATCH_ROWS):
        count = len(next(iter(batch.values())))
        try:
            keys = _batch_keys(batch, count, columns)
        except TypeError:
            raise _first_error(batch, columns, path, position) from None
        found["rows"].frombytes((keys.rows + position).tobytes())
        for name, values, counts in (
            ("own", keys.own, keys.own_counts),
            ("negative", keys.negative, keys.negative_counts),
        ):
            found[f"{name}_keys"].frombytes(values.tobytes())
            starts = found[f"{name}_starts"]
            starts.frombytes((starts[-1] + np.cumsum(counts)).tobytes())
        position += count
    return {name: np.frombuffer(values, dtype=np.int64) for name, values in found.items()}


def _batch_keys(batch: Mapping[str, list[Any]], count: int, columns: KeyColumns) -> Keys:
    names = [*columns.own, *([columns.negative] if columns.negative else [])]
    # texts[column][row] is a list of texts.
    texts = [[value_texts(value) for value in _values(batch, count, name)] for name in names]
    counts = np.array([[len(some) for some in column] for column in texts], dtype=np.int64)
    flat = [text for column in texts for some in column for text in some]
    ids = _of_distinct(caption_ids, flat)
    rows = np.repeat(np.tile(np.arange(count), len(names)), counts.ravel())
    group_rows, group_ids = _group_keys(batch, count, columns.group)

    # One number for row and id, of the same order, so that rows are compared by operations on plain arrays.
    known, numbers = np.unique(np.concatenate([ids, group_ids]), return_inverse=True)
    pairs = np.concatenate([rows, group_rows]) * len(known) + numbers
    num_own = int(counts[: len(columns.own)].sum())
    own, negative, groups = np.split(pairs, [num_own, len(ids)])
    own = np.unique(own)
    negative = np.setdiff1d(negative, own)

    usable = _per_row(own, len(known), count) > 1
    if columns.each_needed:
        usable &= (counts[: len(columns.own)] > 0).all(axis=0)
    if columns.negative:
        usable &= _per_row(negative, len(known), count) > 0
    parts: list[np.ndarray] = []
    for part in (np.union1d(own, groups), negative):
        part = part[usable[part // max(1, len(known))]]
        parts += [known[part % max(1, len(known))], _per_row(part, len(known), count)[usable]]
    return Keys(np.flatnonzero(usable), *parts)


def _per_row(pairs: np.ndarray, num_known: int, count: int) -> np.ndarray:
    return np.bincount(pairs // max(1, num_known), minlength=count)


def _values(batch: Mapping[str, list[Any]], count: int, column: str) -> list[Any]:
    """Return the values of a column of a batch, by the rule of [`column_value`]."""
    if column in batch:
        return batch[column]
    name = column.split(".")[0]
    return [column_value({name: record}, column) for record in batch.get(name, [None] * count)]


def _group_keys(batch: Mapping[str, list[Any]], count: int, column: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that have a group, and the key of each."""
    values = _values(batch, count, column) if column else []
    rows = [row for row, value in enumerate(values) if value is not None]
    names = [str(values[row]) for row in rows]
    ids = _of_distinct(lambda names: [stable_seed("group", name) for name in names], names)
    return np.array(rows, dtype=np.int64), ids


def _of_distinct(compute: Callable[[Iterable[str]], Sequence[int] | np.ndarray], texts: list[str]) -> np.ndarray:
    """Compute the ids of texts, of each distinct one once."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    ids = np.array(compute(numbers), dtype=np.int64)
    return ids[np.fromiter(map(numbers.__getitem__, texts), dtype=np.int64, count=len(texts))]


def _first_error(batch: Mapping[str, list[Any]], columns: KeyColumns, path: str, position: int) -> SourceError:
    """Describe the first row of a batch with something else than text, which columns are not read in order of."""
    names = [*columns.own, *([columns.negative] if columns.negative else [])]
    for offset, name in itertools.product(range(len(next(iter(batch.values())))), names):
        try:
            column_texts({key: values[offset] for key, values in batch.items()}, name)
        except TypeError as error:
            return SourceError(f"Row {position + offset} of {path}: {error}.")
    raise AssertionError("the rows of a batch contain the texts of its columns.")
