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
    MultilingualData,
    PairData,
    RetrievalData,
)

FIVE = BenchmarkImages([b"1", b"2", b"3", b"4", b"5"], ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"])
NUMBERED = BenchmarkImages([b"1", b"2", b"3"], ["image/1.jpg", "image/2.jpg", "image/4.jpg"])
COCO = BenchmarkImages([b"1", b"2"], ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000139.jpg"])
CAPTIONS = [["x"] * 2, ["x"], ["x"] * 2, ["y"] * 3, ["z"] * 2]


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
        (MultilingualData({"de": RetrievalData.from_captions(FIVE, CAPTIONS)}), {"languages": 2}, ""),
        (RetrievalData.from_captions(BenchmarkImages([]), []), {"images": 2, "texts": 2}, ""),
    ],
)  # fmt: skip
def test_rows_that_stand_out_are_named(data: Any, published: dict[str, int], words: str) -> None:
    assert unusual_rows(published, data, Path("sets")) == (f"What stands out: {words}." if words else "")
