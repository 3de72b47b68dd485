"""The captions of CRA, from the two files of the COCO test split, without images."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.evaluation.benchmarks.base import BenchmarkError
from tests.llm2clip.evaluation.benchmarks.samples import read, write

CAPTIONS = [[" A café. ", "B", "C", "D", "E", "F"], ["B", " A café. "]]


def karpathy(folder: Path) -> None:
    rows = [
        {
            "filename": f"{number}.jpg",
            "cocoid": number,
            "split": split,
            "sentids": list(range(len(texts))),
            "sentences": [{"raw": text} for text in texts],
        }
        for number, (split, texts) in enumerate([("test", CAPTIONS[0]), ("val", ["x", "y"]), ("test", CAPTIONS[1])])
    ]
    write(folder / "dataset_coco.json", {"images": rows})


def salesforce(folder: Path) -> None:
    rows = [{"image": f"val2014/{number}.jpg", "caption": texts} for number, texts in enumerate(CAPTIONS)]
    write(folder / "coco_karpathy_test.json", rows)


@pytest.mark.parametrize("write_captions", [karpathy, salesforce])
def test_the_first_two_captions_are_taken(write_captions: object, tmp_path: Path) -> None:
    write_captions(tmp_path / "coco")  # type: ignore[operator]
    data = read("cra", tmp_path)
    assert (data.queries, data.targets) == ([" A café. ", "B"], ["B", " A café. "])
    assert data.counts() == {"pairs": 2}


def test_an_image_with_one_caption_is_named(tmp_path: Path) -> None:
    write(tmp_path / "coco_karpathy_test.json", [{"image": "val2014/7.jpg", "caption": ["alone"]}])
    with pytest.raises(BenchmarkError, match=r"val2014/7\.jpg of .* has fewer"):
        read("cra", tmp_path)
