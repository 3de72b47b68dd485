"""The grammar of conditions: what reaches outside is refused. Their answers are in test_store_contract.py."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from llm2clip.search.lance_rows import LanceConditions
from llm2clip.search.search_index import SearchIndex
from llm2clip.search.where import parse_where

from .helpers import QUERY, error

COLUMNS = {"text": pa.string(), "size": pa.int64(), "is_new": pa.bool_(), "day": pa.date32(), "share": pa.float32()}


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("size = 1) OR (size = 2", "AND, OR or its end is missing before )"),
        ("(size = 1", ") is missing before its end"),
        ("size = 1 -- all", "'-- all' is no column"),
        ("size = 1 /* all */", "'/* all */' is no column"),
        ("size = 1; DROP TABLE images", "'; DROP TABLE images' is no"),
        ("size = (SELECT 1)", "a value is missing before ("),
        ("pg_read_file('/etc/passwd') LIKE 'r%'", "there is no column pg_read_file"),
        ("_id IS NOT NULL", "there is no column _id"),
        ("size = 1 LIMIT 1", "is missing before LIMIT"),
        ("size", "a comparison, such as = is missing before its end"),
        ("size = 'x'", "size holds numbers, and 'x' is none"),
        ("size = 1.5", "1.5 is no value of size, which is int64"),
        ("size = 99999999999999999999", "is no value of size"),
        ("share < 1e39", "1e39 is no value of share, which is float"),
        ("share IN (0, -1e400)", "-1e400 is no value of share, which is float"),
        ("size = NULL", "is missing before NULL (for missing values, write IS NULL)"),
        ('text = "x"', "a value is missing before x (strings are in single quotes)"),
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
    with pytest.raises(ValueError, match="no condition on the columns text, size, is_new, day") as refused:
        parse_where(where, COLUMNS, LanceConditions())
    assert reason in str(refused.value)


def test_the_command_refuses_them_before_it_loads_the_model(
    indexed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SearchIndex, "encoder", lambda *_: pytest.fail("it was loaded"))
    for where in ("source = 'noto'", "folder = 'a' ORDER BY size", "1 / 0 = 1", "cast(folder AS int) = 1"):
        message = error(capsys, "search", indexed, "a dog", "--where", where)
        assert f"where is {where!r}, which is no condition on the columns key, folder, extension, size" in message
    assert "where is empty" in error(capsys, "search", indexed, "a dog", "--where", "")


def test_what_the_database_cannot_answer_is_no_damage(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanceConditions, "value", lambda *_: "nonsense(1)")
    with pytest.raises(ValueError, match=r"where is 'size > 1', which LanceDB does not take: .*nonsense") as refused:
        SearchIndex.open(indexed).search(QUERY, 3, "size > 1")
    assert "damaged" not in str(refused.value)
