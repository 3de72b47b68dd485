"""Every fixture of the original code is in the table of tests/fixtures/README.md, and used where it says."""

from __future__ import annotations

import ast
from importlib import import_module

import pytest

from tests.golden import FOLDER

TESTS = FOLDER.parents[1]


def table() -> dict[str, list[str]]:
    """Test files by fixture."""
    lines = (TESTS / "fixtures" / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[1:3] for line in lines if line.startswith("| ")][2:]
    return {name.strip(): files.strip().split(", ") for names, files in rows for name in names.split(",")}


def texts_of(file: str) -> set[str]:
    """The texts in the code of a test, written out or put together in lists of its module."""
    module = import_module(f"tests.{file.removesuffix('.py').replace('/', '.')}")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    written = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    lists = [value for value in vars(module).values() if isinstance(value, (list, tuple, dict))]
    return written | {item for values in lists for item in values if isinstance(item, str)}


def test_every_fixture_is_in_the_table() -> None:
    assert set(table()) == {path.stem for path in FOLDER.glob("*.json")}


@pytest.mark.parametrize("file", sorted({file for files in table().values() for file in files}))
def test_the_tests_in_the_table_name_their_fixtures(file: str) -> None:
    assert {fixture for fixture, files in table().items() if file in files} <= texts_of(file)
