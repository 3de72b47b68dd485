"""The tables of docs/scaling.md are those of the benchmarks, and the plot is there."""

from __future__ import annotations

import pytest

from benchmarks.scale import page


def test_the_page_contains_the_tables_of_the_command() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.fill(text) == text


def test_a_page_without_a_place_for_the_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="has 0 places for the tables 'measured'"):
        page.fill("# No tables\n")
