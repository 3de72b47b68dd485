"""The tables of docs/scaling.md match the output of the script."""

from __future__ import annotations

import pytest

from benchmarks import scaling


def test_the_page_contains_the_tables_of_the_script() -> None:
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.fill(page) == page


def test_counted_operations_match_the_formulas() -> None:
    """EVA02-B/16: 12 layers of 4 d d + 3 d 2048 weights for 197 tokens, products of attention, patch embedding."""
    tokens, width = 197, 768
    weights = 12 * (4 * width * width + 3 * width * 2048)
    attention = 12 * 2 * tokens * tokens * width
    patches = 196 * width * 3 * 16 * 16
    assert scaling.image_flops("LLM2CLIP-EVA02-B-16") == pytest.approx(
        2 * (tokens * weights + attention + patches), rel=0.01
    )


def test_hours_follow_from_operations_and_gpus() -> None:
    day = scaling.PEAK["A100"] * 0.5 * 24 * 3600
    assert scaling.hours(day, 0.5, 1, "A100") == pytest.approx(24)
    assert scaling.hours(day, 0.5, 8, "A100") == pytest.approx(24 / 8 / scaling.EIGHT)
