"""The tables of docs/scaling.md match the output of the script."""

from __future__ import annotations

from benchmarks import scaling


def test_the_page_contains_the_tables_of_the_script() -> None:
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.fill(page) == page
