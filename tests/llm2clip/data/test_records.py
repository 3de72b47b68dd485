from __future__ import annotations

from collections import Counter

import pytest

from llm2clip.data import caption_id
from llm2clip.data.captioned_images import CaptionError, RowCaptions, clean_caption, column_texts


def test_caption_id_ignores_only_case_white_space_and_unicode_composition() -> None:
    same = ["A red  squirrel", "a RED squirrel\n", "\ta red\u00a0squirrel "]
    assert len({caption_id(text) for text in same}) == 1
    assert caption_id("caf\u00e9") == caption_id("cafe\u0301")
    assert caption_id("STRASSE") == caption_id("straße")
    assert caption_id("a red squirrel") != caption_id("a red squirrel.")
    assert caption_id("a red squirrel") == 6556511861023502500


def test_clean_caption_strips_white_space_and_rejects_other_types() -> None:
    assert clean_caption("  a cat\n") == "a cat"
    assert all(clean_caption(text) is None for text in (None, "", " \n", float("nan")))
    with pytest.raises(TypeError, match="must be text, not int"):
        clean_caption(3)


def test_columns_may_contain_texts_lists_or_records() -> None:
    row = {"a": " x ", "b": ["y", None, " ", "z"], "c": {"d": {"e": "w"}}, "f.g": "v", "n": None}
    assert [column_texts(row, name) for name in ("a", "b", "c.d.e", "f.g", "n", "c.q", "n.q")] == [
        ["x"], ["y", "z"], ["w"], ["v"], [], [], []
    ]  # fmt: skip
    with pytest.raises(TypeError, match="column 'c': a caption must be text, not dict"):
        column_texts(row, "c")


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        (None, {"real": 1 / 2, "d1": 1 / 6, "d2": 1 / 6, "d3": 1 / 6}),
        ([0.5, 0.5], {"real": 1 / 2, "d1": 1 / 6, "d2": 1 / 6, "d3": 1 / 6}),
        ([1.0, 9.0], {"real": 0.1, "d1": 0.3, "d2": 0.3, "d3": 0.3}),
        ([0.0, 1.0], {"d1": 1 / 3, "d2": 1 / 3, "d3": 1 / 3}),
    ],
)
def test_captions_are_drawn_by_weight(weights: list[float] | None, shares: dict[str, float]) -> None:
    captions = RowCaptions.of({"real": "real", "dense": ["d1", "d2", "d3"]}, "k", ["real", "dense"], weights)
    draws = 4000
    counts = Counter(captions.draw(seed) for seed in range(draws))
    assert set(counts) == set(shares)
    for text, share in shares.items():
        assert abs(counts[text] / draws - share) < 4 * (share * (1 - share) / draws) ** 0.5


def test_row_without_a_drawable_caption_raises() -> None:
    for row, weights in (({"a": " ", "b": []}, None), ({"a": "x", "b": None}, [0.0, 1.0])):
        with pytest.raises(CaptionError, match="'k7' cannot be used: it has no text in a, b"):
            RowCaptions.of(row, "k7", ["a", "b"], weights)
    with pytest.raises(CaptionError, match="'k7' cannot be used: column 'a': a caption must be text, not int"):
        RowCaptions.of({"a": 1}, "k7", ["a"], None)
