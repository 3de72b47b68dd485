"""Files with other counts than the published ones: the refusal says which rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.evaluation.benchmarks.unusual_rows import unusual_rows
from llm2clip.evaluation.data import (
    BenchmarkImages,
    CaptionPairData,
    ClassificationData,
    HardNegativeData,
    MultilingualData,
    PairData,
    RetrievalData,
    SeveralSets,
)
from llm2clip.evaluation.segmentation_data import SegmentationData

FIVE = BenchmarkImages([b"1", b"2", b"3", b"4", b"5"], ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"])
NUMBERED = BenchmarkImages([b"1", b"2", b"3"], ["image/1.jpg", "image/2.jpg", "image/4.jpg"])
COCO = BenchmarkImages([b"1", b"2"], ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000139.jpg"])
CAPTIONS = [["x"] * 2, ["x"], ["x"] * 2, ["y"] * 3, ["z"] * 2]
THREE = BenchmarkImages([b"1", b"2", b"3"], ["a.jpg", "b.jpg", "c.jpg"])


def captions(*texts: str) -> RetrievalData:
    """A caption of each of the first of three images."""
    return RetrievalData.from_captions(THREE, [*([text] for text in texts), *[[]] * (3 - len(texts))])


@pytest.mark.parametrize(
    ("data", "published", "words"),
    [
        (RetrievalData.from_captions(FIVE, CAPTIONS), {"images": 6, "texts": 12},
         "images with another number of captions: b.jpg (1), d.jpg (3); the last image is number 5, e.jpg; "
         "the last row is number 10, e.jpg 'z'"),
        (RetrievalData.from_captions(FIVE, [["a"], ["b", "b"], [], ["d"], ["e"]]), {"images": 5, "texts": 4},
         "images with another number of captions: c.jpg (0); repeated rows: b.jpg 'b'"),
        (RetrievalData.from_captions(NUMBERED, [["a"], ["b"], ["d"]]), {"images": 4, "texts": 4},
         "numbers without an image: 3; the last row is number 3, image/4.jpg 'd'"),
        (RetrievalData.from_captions(COCO, [["a"], ["b"]]), {"images": 3, "texts": 2},
         "the last image is number 2, COCO_val2014_000000000139.jpg"),
        (ClassificationData(FIVE, torch.tensor([0, 0, 1, 1, 2]), ["one", "two", "three"]), {"images": 6, "classes": 3},
         "classes with another number of images: three (1)"),
        (ClassificationData(FIVE, torch.tensor([0, 0, 0, 0, 2]), ["one", "two", "three"]), {"images": 6, "classes": 3},
         "classes with another number of images: two (0)"),
        (PairData(COCO, ["left", "right"], ["all"]), {"pairs": 4},
         "the last row is number 1, COCO_val2014_000000000042.jpg 'left' 'right'"),
        (CaptionPairData(["a", "b"], ["c", "d"]), {"pairs": 3}, "the last row is number 2, 'b' 'd'"),
        # XTD10: an image with an empty list, a language whose file ends early; a fact of both is said once.
        (MultilingualData({"de": captions("a", "b", "c"), "jp": captions("a", "b")}),
         {"images": 4, "languages": 3, "texts": 12},
         "the languages with captions are de, jp; de, jp: the last image is number 3, c.jpg; "
         "de: the last row is number 3, c.jpg 'c'; jp: images with another number of captions: c.jpg (0); "
         "jp: the last row is number 2, b.jpg 'b'"),
        # XM3600: the numbers of captions differ, so that only images without any stand out.
        (MultilingualData({"de": captions("a", "b", "c"), "quz": captions("a", "b")}),
         {"images": 3, "languages": 2, "texts": 7},
         "quz: images with another number of captions: c.jpg (0)"),
        # SugarCrepe: a file a kind.
        (HardNegativeData(COCO, torch.tensor([0, 1, 0, 0]), ["x", "y", "z", "z"], ["a", "b", "c", "c"],
                          ["add_att", "add_att", "swap_obj", "swap_obj"]), {"add_att": 3, "swap_obj": 1},
         "add_att: the last row is number 2, COCO_val2014_000000000139.jpg 'y' 'b'; "
         "swap_obj: repeated rows: COCO_val2014_000000000042.jpg 'z' 'c'"),
        (SeveralSets({"one": ClassificationData(FIVE, torch.tensor([0, 0, 1, 1, 2]), ["dog", "cat", "bus"])}),
         {"sets": 1, "one images": 6, "one classes": 3}, "one: classes with another number of images: bus (1)"),
        (SegmentationData("Maps", NUMBERED, [], {}, torch.zeros(256)), {"images": 4, "classes": 0},
         "numbers without an image: 3"),
        (RetrievalData.from_captions(BenchmarkImages([]), []), {"images": 2, "texts": 2}, ""),
    ],
)  # fmt: skip
def test_rows_that_stand_out_are_named(data: Any, published: dict[str, int], words: str) -> None:
    assert unusual_rows(published, data, Path("sets")) == (f"What stands out: {words}." if words else "")
