"""Conditions: one grammar, with equal answers on all stores, and nothing that reaches outside of it."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from llm2clip.search.folder_items import BINARY, digest
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.index_settings import IndexSettings
from llm2clip.search.lance_rows import LanceConditions
from llm2clip.search.search_index import SearchIndex
from llm2clip.search.store import ID, KEY, REASON, VECTOR, IndexStore, open_store
from llm2clip.search.where import parse_where

DAY, TIME = date(2026, 1, 2), datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
COLUMNS: dict[str, tuple[pa.DataType, list[Any]]] = {
    KEY: (pa.string(), ["a", "b", "c", "d", "e"]),
    "text": (pa.string(), ["Dog", "dog's", "100%_\\", "éa", None]),
    "size": (pa.int64(), [1, 2, -3, 4, None]),
    "share": (pa.float32(), [0.1, 0.5, 1e20, -2, None]),
    "is_new": (pa.bool_(), [True, False, True, False, None]),
    "day": (pa.date32(), [DAY, date(2025, 1, 1), DAY, date(1960, 2, 29), None]),
    "time": (pa.timestamp("us", "UTC"), [TIME, TIME, datetime(2000, 1, 1, tzinfo=UTC), TIME, None]),
    "Odd \"name\" %": (pa.int64(), [1, 2, 3, 4, None]),
}  # fmt: skip
FOUND = {
    "size > 1": "bd",
    "size >= 1 AND NOT size = 2": "ad",
    "NOT (size = 2 OR text = 'Dog')": "cd",
    "size IN (1, 4, 9) OR key = 'e'": "ade",
    "size NOT IN (1, 4)": "bc",
    "size IS NULL": "e",
    "text IS NOT NULL AND size <> 1": "bcd",
    "NOT text IS NULL": "abcd",
    "text = 'dog''s'": "b",
    "text LIKE 'd%'": "b",
    "text LIKE '%\\'": "c",
    "text LIKE '100__\\'": "c",
    "text NOT LIKE 'D_g'": "bcd",
    "text < 'a'": "ac",
    "text >= 'dog'": "bd",
    "share = 0.1": "a",
    "share > 1e19": "c",
    "is_new": "ac",
    "NOT is_new": "bd",
    "is_new = false OR is_new IS NULL": "bde",
    "day = '2026-01-02'": "ac",
    "day < '1970-01-01'": "d",
    "time > '2026-01-02'": "abd",
    "time = '2026-01-02T03:04:05'": "abd",
    "time = '2026-01-02 04:04:05+01:00' and is_new": "a",
    '"Odd ""name"" %" <= 2': "ab",
    "text = 'none\0'": "",
}


def build(store: IndexStore) -> SearchIndex:
    columns = {name: pa.array(values, kind) for name, (kind, values) in COLUMNS.items()}
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.eye(5, 8, dtype=np.float16).reshape(-1)), 8)
    columns |= {ID: pa.array([digest(key) for key in "abcde"], BINARY), REASON: pa.nulls(5, pa.string())}
    rows = pa.table({**columns, VECTOR: vectors})
    manifest = IndexManifest("model", None, "none", 8, "float16", {"kind": "folder", "path": "none"}, {}, images=5)
    with store.lock():
        store.begin(manifest, rows.schema, "nothing")
        store.upsert(rows)
        manifest.index = IndexSettings("flat").index_of(5, 8, store.index_types)
        store.commit(manifest, [])
    return SearchIndex.open(store)


def test_conditions_have_equal_answers_on_all_stores(url: str, tmp_path: Path) -> None:
    for index in (build(open_store(tmp_path / "index")), build(open_store("conditions", url))):
        for where, keys in FOUND.items():
            found = index.search(np.ones((1, 8), np.float32), 9, where)[0]
            assert "".join(sorted(one.key for one in found)) == keys, (index.location, where)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("1=1) OR (1=1", "a column is missing before 1"),
        ("size = 1) OR (size = 2", "AND, OR or its end is missing before )"),
        ("(size = 1", ") is missing before its end"),
        ("size = 1 -- all", "'-- all' is no column, value or comparison"),
        ("size = 1 /* all */", "'/* all */' is no column"),
        ("size = 1; DROP TABLE images", "'; DROP TABLE images' is no"),
        ("size = (SELECT 1)", "a value is missing before ("),
        ("pg_read_file('/etc/passwd') LIKE 'r%'", "there is no column pg_read_file"),
        ("pg_sleep(9) IS NULL", "there is no column pg_sleep"),
        ("_id IS NOT NULL", "there is no column _id"),
        ("nope = 1", "there is no column nope"),
        ("size", "a comparison, such as = is missing before its end"),
        ("size = 'x'", "size holds numbers, and 'x' is none"),
        ("size = 1.5", "1.5 is no value of size, which is int64"),
        ("size = 99999999999999999999", "is no value of size"),
        ("size = NULL", "for missing values, write IS NULL"),
        ("size LIKE '1'", "size holds numbers, and LIKE compares strings"),
        ("day = 'today'", "'today' is no value of day, which is date32"),
        ("is_new > false", "is_new holds true and false, which have no order"),
        ("text = 'x", "is no column, value"),
        ("size NOT = 1", "IN or LIKE is missing before ="),
        ("(" * 30 + "is_new" + ")" * 30, "nested more than 10 deep"),
        ("size IN (" + "1," * 1500 + "1)", "more than 1000 values"),
        (" ", "a column is missing before its end"),
    ],
)  # fmt: skip
def test_all_else_is_refused_with_the_columns_that_there_are(where: str, reason: str) -> None:
    columns = {name: kind for name, (kind, _) in COLUMNS.items()}
    with pytest.raises(ValueError, match="no condition on the columns key, text, size, share, is_new, day") as error:
        parse_where(where, columns, LanceConditions())
    assert reason in str(error.value)
    assert "vector" not in str(error.value)
