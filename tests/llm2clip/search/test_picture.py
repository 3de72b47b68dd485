"""The PNG of search results: complete titles and rows of thumbnails."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from llm2clip.search.image_index import IndexManifest
from llm2clip.search.picture import draw_picture, font_families, wrap
from llm2clip.search.results import QueryResults, ResultImages, SearchResult

CAT = "猫"
MANIFEST = IndexManifest("model", None, "", 24, "float16", {"kind": "folder", "path": "."}, {"type": "flat"})


def draw(path: Path, text: str, count: int = 4) -> np.ndarray:
    """Draw a query whose images no longer exist; return `(height, 1000)` grey levels."""
    found = QueryResults(text, None, [SearchResult(0.5, "gone.png", "gone.png")] * count)
    draw_picture(path, [found], ResultImages(MANIFEST))
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


@pytest.fixture
def font_of_a_cat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Install a font whose only character is a cat, drawn as a black square; return its family."""
    pen = TTGlyphPen(None)
    for number, corner in enumerate([(0, 0), (0, 1000), (1000, 1000), (1000, 0)]):
        (pen.lineTo if number else pen.moveTo)(corner)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord(CAT): "cat"})
    builder.setupGlyf({".notdef": square, "cat": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Cat Sans", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path = tmp_path / "cat.ttf"
    builder.save(path)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(path)
    return "Cat Sans"


def test_lines_break_between_words_and_inside_overlong_words() -> None:
    assert wrap("a bb\n ccc dddddddd e", 4, len) == ["a bb", "ccc", "dddd", "dddd", "e"]
    assert wrap("", 4, len) == [""]


@pytest.mark.parametrize("text", ["a train on a rail " * 40, CAT * 200])
def test_a_long_query_is_wrapped_and_moves_the_images_down(text: str, tmp_path: Path) -> None:
    short, long = draw(tmp_path / "short.png", "a train"), draw(tmp_path / "long.png", text)
    assert len(long) > len(short) + 3 * 26
    above = long[: len(long) - len(short)]
    assert (above < 128).any()
    assert (above[:, -20:] == 255).all()


def test_many_results_are_distributed_over_even_rows(tmp_path: Path) -> None:
    heights = [len(draw(tmp_path / f"{count}.png", "a", count)) for count in (8, 9, 16, 5)]
    eight, nine, sixteen, five = heights
    # Nine results fill two rows of five, whose thumbnails are larger than those of eight in a row.
    assert nine > five + 100
    assert sixteen - eight == pytest.approx(26 + (1000 - 2 * 24 - 7 * 14) / 8, abs=1)


def test_missing_characters_are_drawn_in_another_font(
    font_of_a_cat: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    assert font_families("a cat") == font_manager.FontProperties().get_family()
    assert font_of_a_cat in font_families(CAT)
    pixels = draw(tmp_path / "cat.png", CAT)[24:58]
    assert (pixels < 64).sum() > 15 * 15  # the square
    assert not caplog.records
    assert not recwarn.list


def test_characters_without_a_font_are_logged_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    usual = [entry for entry in font_manager.fontManager.ttflist if entry.name.startswith(("DejaVu", "Last Resort"))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", usual)
    with caplog.at_level(logging.WARNING):
        draw(tmp_path / "boxes.png", f"a dog {CAT}{CAT} or 犬\n")
    (record,) = caplog.records
    assert f"no installed font has the characters 犬 {CAT}, which" in record.getMessage()
    assert not recwarn.list
