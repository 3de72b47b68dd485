"""Text formats: what each does to one awkward caption, by hand from the code that it is named after."""

from __future__ import annotations

import pytest

from llm2clip.evaluation.text_formats import TEXT_FORMATS, choose_text_format

CAPTION = '  A T-shirt, "red".\nWho?  It\'s (a) <person>... and/or Über. '
EXPECTED = {
    "raw": CAPTION,
    "lower": '  a t-shirt, "red".\nwho?  it\'s (a) <person>... and/or über. ',
    "albef": "a t shirt red\nwho its a person and or über",
    "blip": "a t-shirt, red who? it's a <person> and/or über",
    "flair": 'A T-shirt, "red". Who?  It\'s (a) <person>. and/or Über',
    "long-clip": '  A T-shirt, "red". Who?  It\'s (a) <person>... and/or Über. ',
}


@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_what_a_format_does(name: str) -> None:
    assert choose_text_format(name)(CAPTION) == EXPECTED[name]


@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_an_empty_caption_stays_one(name: str) -> None:
    assert choose_text_format(name)("") == ""


def test_albef_and_blip_cut_to_thirty_words() -> None:
    words = [f"w{number}" for number in range(40)]
    for name in TEXT_FORMATS:
        cut = choose_text_format(name)(" ".join(words))
        assert cut.split() == (words[:30] if name in ("albef", "blip") else words)


def test_an_unknown_format_is_an_error_with_all_names() -> None:
    with pytest.raises(ValueError, match="'FLAIR' is unknown; there are raw, lower, albef, blip, flair, long-clip"):
        choose_text_format("FLAIR")
