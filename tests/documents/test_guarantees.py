"""Every promise of `tests/GUARANTEES.md` has a page that exists and a test that is found under its name."""

from __future__ import annotations

import ast
import re

import pytest

from tests.documents.reading import ROOT

TABLE = ROOT / "tests" / "GUARANTEES.md"
ROW = re.compile(r"\| (?P<promise>[^|]+) \| \[(?P<page>[^|\]]+)\]\(\.\./(?P<link>[^|)]+)\) \| `(?P<test>[^|`]+)` \|")
LINES = TABLE.read_text(encoding="utf-8").splitlines()
ROWS = [line for line in LINES if line.startswith("| ")][2:]


def columns(row: str) -> dict[str, str]:
    match = ROW.fullmatch(row)
    assert match, f"this row is not `| promise | [page](../page) | test |`: {row}"
    return match.groupdict()


def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS)
def test_page_and_test_of_a_promise_exist(row: str) -> None:
    found = columns(row)
    assert found["page"] == found["link"]
    assert (ROOT / found["page"]).is_file(), f"{found['page']} is gone"
    path, _, name = found["test"].partition("::")
    assert (ROOT / path).is_file(), f"{path} is gone"
    assert name.startswith("test_"), f"pytest does not collect {name}"
    assert name in functions(path), f"{path} has no {name}"


def test_no_promise_or_test_is_there_twice() -> None:
    for column in ("promise", "test"):
        values = [columns(row)[column] for row in ROWS]
        assert values
        assert len(set(values)) == len(values)
