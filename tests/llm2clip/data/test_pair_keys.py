"""Keys computed from whole columns are those of the rows, one by one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from llm2clip.data import PairDataset, caption_id
from llm2clip.data.captioned_images import column_texts
from llm2clip.data.opened_table import SourceError
from llm2clip.data.pair_keys import BATCH_ROWS, KeyColumns, pair_keys
from llm2clip.data.sampling import stable_seed
from llm2clip.data.sources import column_value

from .pairs import table_source

AWKWARD = [
    "a dog", "A  Dog", " a\tdog\n", "a\u3000dog", "a\x1cdog\x85", "straße", "STRASSE", "Σίσυφος", "ΣΊΣΥΦΟΣ",
    "caf\u00e9", "cafe\u0301", "\u212bngstrom", "\u00e5ngstrom", "ﬁsh", "fish", "İstanbul", "i\u0307stanbul", "", " ",
    "\u2003\n", None, "\u0301", " \u0301x", "nan", "None", "\x00", "a\x1fb", "\ud55c", "\u1112\u1161\u11ab", "🐕",
    "a\u200bdog",
]  # fmt: skip


def by_rows(table: datasets.Dataset, columns: KeyColumns) -> dict[str, list[int]]:
    """The formula, directly."""
    found: dict[str, list[int]] = {"rows": [], "own_keys": [], "own_starts": [0]}
    found |= {"negative_keys": [], "negative_starts": [0]}
    for position, row in enumerate(table):
        texts = [column_texts(row, name) for name in columns.own]
        own = {caption_id(text) for some in texts for text in some}
        negative = {caption_id(text) for text in column_texts(row, columns.negative)} if columns.negative else set()
        negative -= own
        if len(own) < 2 or (columns.each_needed and not all(texts)) or (columns.negative and not negative):
            continue
        group = column_value(row, columns.group) if columns.group else None
        found["rows"].append(position)
        found["own_keys"] += sorted(own | (set() if group is None else {stable_seed("group", str(group))}))
        found["own_starts"].append(len(found["own_keys"]))
        found["negative_keys"] += sorted(negative)
        found["negative_starts"].append(len(found["negative_keys"]))
    return found


@pytest.fixture(scope="module")
def awkward() -> datasets.Dataset:
    generator = random.Random(0)
    rows = BATCH_ROWS + 300
    one = [generator.choice(AWKWARD) for _ in range(rows)]
    few = [generator.choice([None, generator.choices(AWKWARD, k=generator.randrange(4))]) for _ in range(rows)]
    numbers = [generator.choice([None, 0.5, 7.0, float("nan")]) for _ in range(rows)]
    nested = [generator.choice([None, {"text": generator.choice(AWKWARD), "n": row // 3}]) for row in range(rows)]
    columns = {"one": one, "few": few, "record": nested, "number": numbers, "void": [float("nan")] * rows}
    return datasets.Dataset.from_dict(columns | {"dotted.name": generator.sample(one, rows), "nothing": [None] * rows})


@pytest.mark.parametrize(
    "columns",
    [
        KeyColumns(["one", "few"], True),
        KeyColumns(["one", "few"], False, None, "number"),
        KeyColumns(["few", "one"], True, "dotted.name", "record.n"),
        KeyColumns(["record.text", "dotted.name"], True, "few", "one"),
        KeyColumns(["one", "void", "nothing", "record.text"], False, None, "few"),
        KeyColumns(["one", "one"], True),
    ],
)
def test_keys_of_awkward_texts_are_those_of_the_direct_formula(awkward: datasets.Dataset, columns: KeyColumns) -> None:
    for table in (awkward, awkward.select(range(BATCH_ROWS)), awkward.select([5, 3, 3]), awkward.select([])):
        expected = by_rows(table, columns)
        found = pair_keys(table, columns, "table")
        assert all(values.dtype == np.int64 for values in found.values())
        assert {name: values.tolist() for name, values in found.items()} == expected


def test_the_first_row_with_something_else_than_text_is_named(tmp_path: Path) -> None:
    rows = BATCH_ROWS + 9
    numbers: list[Any] = [None] * rows
    nested: list[Any] = [None] * rows
    numbers[BATCH_ROWS + 2] = numbers[BATCH_ROWS + 4] = 5
    nested[BATCH_ROWS + 3] = [["x"]]
    columns = {"q": [f"q{row}" for row in range(rows)], "number": numbers, "nested": nested}
    for names in (["nested", "number"], ["number", "nested"]):
        with pytest.raises(SourceError, match=rf"Row {BATCH_ROWS + 2} of .*: column 'number': .* not int \(5\)\.$"):
            PairDataset(table_source(tmp_path, columns, caption_columns=["q", *names]))
