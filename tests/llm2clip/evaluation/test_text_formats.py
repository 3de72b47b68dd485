"""Text formats: what each does to one awkward caption, by hand from the code that it is named after, and to what."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm2clip.evaluation.data import (
    BenchmarkImages,
    CaptionPairData,
    ClassificationData,
    HardNegativeData,
    MultilingualData,
    PairData,
    RetrievalData,
)
from llm2clip.evaluation.segmentation_data import SegmentationData
from llm2clip.evaluation.text_formats import TEXT_FORMATS, format_captions

CAPTION = '  A T-shirt, "red".\nWho?  It\'s (a) <person>... and/or Über. '
EXPECTED = {
    "raw": CAPTION,
    "lower": '  a t-shirt, "red".\nwho?  it\'s (a) <person>... and/or über. ',
    "albef": "a t shirt red\nwho its a person and or über",
    "blip": "a t-shirt, red who? it's a <person> and/or über",
    "flair": 'A T-shirt, "red". Who?  It\'s (a) <person>. and/or Über',
    "long-clip": '  A T-shirt, "red". Who?  It\'s (a) <person>... and/or Über. ',
}
WORDS = [f"w{number}" for number in range(40)]


@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_what_a_format_does(name: str) -> None:
    change = TEXT_FORMATS[name]
    assert change(CAPTION) == EXPECTED[name]
    assert change("") == ""
    assert change(" ".join(WORDS)).split() == (WORDS[:30] if name in ("albef", "blip") else WORDS)


IMAGES = BenchmarkImages([b"image"])
ROWS = RetrievalData(IMAGES, ["A-b", "C"], torch.tensor([0, 0]))
# Data, and the fields in which captions stand.
CAPTIONS: list[tuple[Any, tuple[str, ...]]] = [
    (ROWS, ("texts",)),
    (CaptionPairData(["A-b"], ["C."]), ("queries", "targets")),
    (PairData(IMAGES, ["A-b", "C"], ["Kind"]), ("texts",)),
    (HardNegativeData(IMAGES, torch.tensor([0]), ["A-b"], ["C"], ["Kind_a"]), ("right", "wrong")),
]


class Strangers:
    """Data of a stranger, which are no dataclass."""

    def __init__(self) -> None:
        self.texts, self.ratings = ["A-b"], [1.0]


CAPTIONS.append((Strangers(), ("texts",)))


@pytest.mark.parametrize(("data", "fields"), CAPTIONS, ids=lambda value: type(value).__name__)
def test_captions_of_all_kinds_of_data_are_formatted_and_nothing_else(data: Any, fields: tuple[str, ...]) -> None:
    changed = format_captions(data, "albef")
    assert set(fields) <= set(vars(data))
    for name, value in vars(data).items():
        if name in fields:
            assert getattr(changed, name) == [TEXT_FORMATS["albef"](text) for text in value] != value
        else:
            assert getattr(changed, name) is value


def test_languages_are_formatted_and_prompts_of_classes_are_not() -> None:
    languages = format_captions(MultilingualData({"de": ROWS}), "lower")
    assert languages["de"].texts == ["a-b", "c"]
    classes = ClassificationData(IMAGES, torch.tensor([0]), ["T-shirt"], ["a photo of a {c}."])
    maps = SegmentationData("Sky", IMAGES, [], {"Sky": ("Sky",)}, torch.zeros(256))
    for data in (classes, maps):
        for name in TEXT_FORMATS:
            assert format_captions(data, name) is data
