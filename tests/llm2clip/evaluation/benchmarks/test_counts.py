"""Files with other counts than the published ones: the refusal says which rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.benchmarks.counts import check_counts, describe_rows
from llm2clip.evaluation.data import (
    BenchmarkImages,
    CaptionPairData,
    ClassificationData,
    HardNegativeData,
    PairData,
    RetrievalData,
)
from tests.llm2clip.evaluation.benchmarks.samples import write

ENDING = " With --allow-counts it is measured all the same, and the result says so."


def refusal(name: str, data: Path, **counts: int) -> str:
    """Read a set below a folder as if its published counts were others; returns the message."""
    benchmark = replace(all_benchmarks()[name], counts=counts)
    folder = benchmark.find(data)
    assert folder is not None
    with pytest.raises(BenchmarkError) as error:
        check_counts(benchmark, folder, benchmark.read(folder), allow=False)
    return str(error.value)


def flickr30k(data: Path, captions: dict[str, int]) -> None:
    """Write Salesforce's file of images with so many captions each, and its images."""
    rows = [
        {"image": f"flickr30k-images/{name}.jpg", "caption": [f"{name} {number}" for number in range(count)]}
        for name, count in captions.items()
    ]
    write(data / "flickr30k/flickr30k_test.json", rows)
    for name in captions:
        write(data / f"flickr30k/flickr30k-images/{name}.jpg")


def test_images_of_salesforce_with_another_number_of_captions_are_named(tmp_path: Path) -> None:
    flickr30k(tmp_path, {"a": 5, "b": 4, "c": 5, "d": 6, "e": 4})
    file = tmp_path / "flickr30k/flickr30k_test.json"
    assert refusal("flickr30k", tmp_path, images=5, texts=25).removesuffix(ENDING) == (
        "Flickr30k has 24 texts instead of 25 (1 too few): its numbers could not be compared with published ones. "
        f"In {file}: images with another number of captions than 5: flickr30k-images/b.jpg (4), "
        "flickr30k-images/d.jpg (6), flickr30k-images/e.jpg (4); the last of the captions is number 24, "
        "flickr30k-images/e.jpg 'e 3'."
    )
    assert ENDING in refusal("flickr30k", tmp_path, images=8, texts=40)


def test_classes_and_numbers_without_an_image_are_named(tmp_path: Path) -> None:
    for label in range(1000):
        for number in (1, 2):
            if (label, number) not in {(3, 1), (3, 2), (999, 2)}:
                write(tmp_path / f"imagenetv2-matched-frequency-format-val/{label}/{2 * label + number}.jpeg")
    message = refusal("imagenet-v2", tmp_path, images=2000, classes=1000)
    assert "1,997 images instead of 2,000 (3 too few), 999 classes instead of 1,000 (1 too few)" in message
    assert f"In {tmp_path / 'imagenetv2-matched-frequency-format-val'}: " in message
    assert "classes with another number of images than 2: tiger shark (0), toilet paper in 999 (1); " in message
    assert "numbers without an image: 7, 8." in message


@pytest.mark.parametrize("part", [0.3, 0.999])
def test_the_end_of_a_file_that_is_cut_short_is_shown(part: float, tmp_path: Path) -> None:
    rows = [{"image": f"{number}.jpg", "caption": ["ein Käfer"] * 5} for number in range(9)]
    path = write(tmp_path / "flickr30k/flickr30k_test.json", rows)
    content = path.read_bytes()[: int(part * path.stat().st_size)]
    path.write_bytes(content)
    with pytest.raises(BenchmarkError) as error:
        all_benchmarks()["flickr30k"].read(path.parent)
    assert str(error.value).startswith(f"{path} is not valid JSON, or is cut short: ")
    assert str(error.value).endswith(f"; it ends {content.decode(errors='ignore')[-80:]!r}.")


IMAGES = BenchmarkImages([b"1", b"2", b"3", b"4"], ["1.jpg", "2.jpg", "3.jpg", "4.jpg"])
CHOICES = HardNegativeData(IMAGES, torch.tensor([0, 3, 3]), ["a", "b", "b"], ["c", "d", "d"], ["x", "y", "y"])


@pytest.mark.parametrize(
    ("data", "counts", "rows"),
    [
        (PairData(IMAGES, ["left", "right", "up", "down"], ["a", "b"]), {"pairs": 4, "kinds": 2},
         "In sets: the last of the pairs is number 2, 3.jpg 'up' and 'down'."),
        (CHOICES, {"x": 2, "y": 1}, "In sets: the last of the x rows is number 1, 1.jpg 'a' and 'c'; "
         "repeated y rows: 4.jpg 'b' and 'd' (numbers 1, 2)."),
        (CaptionPairData(["a", "b"], ["c", "d"]), {"pairs": 3},
         "In sets: the last of the pairs is number 2, 'b' and 'd'."),
        (RetrievalData.from_captions(IMAGES, [["a"], ["b", "b"], [], ["d"]]), {"queries": 2},
         "In sets: images without captions: 3.jpg."),
        (ClassificationData(IMAGES, torch.tensor([0, 0, 2, 0]), ["one", "two", "three"]), {"images": 4, "classes": 2},
         "In sets: classes without images: two."),
        (RetrievalData.from_captions(BenchmarkImages([]), []), {"images": 2, "texts": 2}, ""),
    ],
    ids=["pairs", "choices", "captions", "retrieval", "classes", "nothing"],
)  # fmt: skip
def test_rows_of_each_kind_of_data_are_named(data: Any, counts: dict[str, int], rows: str) -> None:
    assert describe_rows(replace(all_benchmarks()["docci"], counts=counts), Path("sets"), data) == rows
