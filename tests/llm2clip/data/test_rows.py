from __future__ import annotations

from collections import Counter

import pytest

from llm2clip.data import caption_id
from llm2clip.data.rows import CaptionError, captions_of, column_texts, draw_caption


def test_caption_id_ignores_only_case_white_space_and_unicode_composition() -> None:
    same = ["A red  squirrel", "a RED squirrel\n", "\ta red\u00a0squirrel "]
    assert len({caption_id(text) for text in same}) == 1
    assert caption_id("caf\u00e9") == caption_id("cafe\u0301")
    assert caption_id("STRASSE") == caption_id("straße")
    assert caption_id("a red squirrel") != caption_id("a red squirrel.")
    assert caption_id("a red squirrel") == 6556511861023502500


def test_columns_may_contain_texts_lists_or_records() -> None:
    row = {"a": " x\n", "b": ["y", None, " ", "z"], "c": {"d": {"e": "w"}}, "f.g": "v", "n": float("nan"), "i": 3}
    assert [column_texts(row, name) for name in ("a", "b", "c.d.e", "f.g", "n", "c.q", "n.q")] == [
        ["x"], ["y", "z"], ["w"], ["v"], [], [], []
    ]  # fmt: skip
    for column, kind in (("c", "dict"), ("i", "int")):
        with pytest.raises(TypeError, match=f"column '{column}': a caption must be text, not {kind}"):
            column_texts(row, column)


@pytest.mark.parametrize(
    ("weights", "real"), [(None, 1 / 2), ([0.5, 0.5], 1 / 2), ([1.0, 9.0], 1 / 10), ([0.0, 1.0], 0)], ids=str
)
def test_captions_are_drawn_by_weight(weights: list[float] | None, real: float) -> None:
    """The captions of a list share its weight."""
    captions = captions_of({"real": "real", "dense": ["d1", "d2", "d3"]}, "k", ["real", "dense"], weights)
    draws = 4000
    counts = Counter(draw_caption(captions, seed) for seed in range(draws))
    for text, share in {"real": real, **dict.fromkeys(("d1", "d2", "d3"), (1 - real) / 3)}.items():
        assert abs(counts[text] / draws - share) <= 4 * (share * (1 - share) / draws) ** 0.5


def test_row_without_a_drawable_caption_raises() -> None:
    with pytest.raises(CaptionError, match="'k7' cannot be used: it has no text in a, b"):
        captions_of({"a": "x", "b": None}, "k7", ["a", "b"], [0.0, 1.0])
