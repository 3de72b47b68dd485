"""Files with other counts than the published ones: the refusal says which rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.benchmarks.counts import check_counts, describe_rows
from llm2clip.evaluation.benchmarks.encoded_images import ArchivedImages, FilePart
from llm2clip.evaluation.data import (
    BenchmarkImages,
    CaptionPairData,
    ClassificationData,
    HardNegativeData,
    PairData,
    RetrievalData,
)
from tests.llm2clip.evaluation.benchmarks.samples import karpathy_row, write, write_lines, xm3600_row

ENDING = " With --allow-counts it is measured all the same, and the result says so."


def refusal(name: str, data: Path, **counts: int) -> str:
    """Read a set below a folder as if its published counts were others; returns the message."""
    benchmark = replace(all_benchmarks()[name], counts=counts)
    folder = benchmark.find(data)
    assert folder is not None
    with pytest.raises(BenchmarkError) as error:
        check_counts(benchmark, folder, benchmark.read(folder), allow=False)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(ENDING)
    return message.removesuffix(ENDING)


def rows_of(name: str, data: Any, **counts: int) -> str:
    """Describe the rows of data that lie nowhere."""
    return describe_rows(replace(all_benchmarks()[name], counts=counts), Path("sets"), data)


def flickr30k(data: Path, captions: dict[str, int], repeated: Sequence[str] = ()) -> None:
    """Write Salesforce's file of images with so many captions each, and its images."""
    rows = [
        {"image": f"flickr30k-images/{name}.jpg", "caption": [f"{name} {number}" for number in range(count)]}
        for name, count in captions.items()
    ]
    write(data / "flickr30k/flickr30k_test.json", [*rows, *(row for row in rows if row["image"][17:-4] in repeated)])
    for name in captions:
        write(data / f"flickr30k/flickr30k-images/{name}.jpg")


def test_images_of_salesforce_with_another_number_of_captions_are_named(tmp_path: Path) -> None:
    flickr30k(tmp_path, {"a": 5, "b": 4, "c": 5, "d": 6, "e": 4})
    file = tmp_path / "flickr30k/flickr30k_test.json"
    assert refusal("flickr30k", tmp_path, images=5, texts=25) == (
        "Flickr30k has 24 texts instead of 25 (1 too few): its numbers could not be compared with published ones. "
        f"In {file}: images with another number of captions than 5: flickr30k-images/b.jpg (4), "
        "flickr30k-images/d.jpg (6), flickr30k-images/e.jpg (4); the last of the captions is number 24, "
        "flickr30k-images/e.jpg 'e 3'."
    )
    flickr30k(tmp_path, dict.fromkeys("abcdefgh", 2))
    assert "flickr30k-images/e.jpg (2) and 3 more;" in refusal("flickr30k", tmp_path, images=8, texts=40)


def test_a_row_that_is_repeated_is_named(tmp_path: Path) -> None:
    flickr30k(tmp_path, dict.fromkeys("abc", 5), repeated="b")
    message = refusal("flickr30k", tmp_path, images=3, texts=15)
    assert "4 images instead of 3 (1 too many), 20 texts instead of 15 (5 too many)" in message
    assert "repeated images: flickr30k-images/b.jpg (numbers 2, 4)" in message
    assert "repeated captions: flickr30k-images/b.jpg 'b 0' (numbers 6, 16), " in message


def test_a_file_of_karpathy_that_lacks_images_and_captions(tmp_path: Path) -> None:
    rows = [
        karpathy_row("COCO_1.jpg", "test", ["a", "b", "c", "d", "e", "f"], 0, filepath="val2014", cocoid=1),
        karpathy_row("COCO_2.jpg", "test", ["a", "b"], 10, filepath="val2014", cocoid=2),
        karpathy_row("COCO_4.jpg", "test", ["a", "b", "c", "d", "e" * 90], 20, filepath="val2014", cocoid=4),
    ]
    write(tmp_path / "coco/dataset_coco.json", {"images": rows})
    for row in rows:
        write(tmp_path / "coco/val2014" / str(row["filename"]))
    message = refusal("coco-karpathy", tmp_path, images=4, texts=20)
    assert "COCO has 3 images instead of 4 (1 too few), 12 texts instead of 20 (8 too few)" in message
    assert f"In {tmp_path / 'coco/dataset_coco.json'}: images with another number of captions than 5: " in message
    assert "val2014/COCO_2.jpg (2); the last of the captions is number 12, val2014/COCO_4.jpg " in message
    assert f"'{'e' * 60}...'; numbers without an image: 3." in message
    # Ten of the 5,000 images have a sixth caption or a seventh.
    assert "images with fewer than 5 captions: val2014/COCO_2.jpg (2);" in refusal(
        "coco-karpathy", tmp_path, images=4, texts=21
    )


def test_languages_and_images_without_captions_are_named(tmp_path: Path) -> None:
    rows = [
        xm3600_row("b", de=["Haus", "Heim"], zh=["房子"], mi=[]),
        xm3600_row("a", de=["Haus"], zh=[]),
        xm3600_row("c", de=["Haus", "Heim"], zh=["房子"]),
    ]
    file = write_lines(tmp_path / "xm3600/captions.jsonl", rows)
    for row in rows:
        write(tmp_path / f"xm3600/images/{row['image/key']}.jpg")
    message = refusal("xm3600", tmp_path, images=4, languages=36, texts=300)
    assert "2 languages instead of 36 (34 too few)" in message
    assert f"In {file}: languages without a caption: ar, bn, cs, da, el and 29 more; " in message
    assert "images without captions: zh images/a.jpg; " in message
    assert message.endswith("the last of the images is number 3, images/c.jpg.")
    message = refusal("xm3600-first", tmp_path, images=3, languages=2, texts=6)
    assert "In" in message
    assert "images with another number of captions than 1: zh images/a.jpg (0)." in message


def test_classes_and_numbers_without_an_image_are_named(tmp_path: Path) -> None:
    for label in range(1000):
        for number in (1, 2):
            if (label, number) not in {(3, 1), (3, 2), (999, 2)}:
                write(tmp_path / f"imagenetv2-matched-frequency-format-val/{label}/{2 * label + number}.jpeg")
    message = refusal("imagenet-v2", tmp_path, images=2000, classes=1000)
    assert "1,997 images instead of 2,000 (3 too few), 999 classes instead of 1,000 (1 too few)" in message
    assert f"In {tmp_path / 'imagenetv2-matched-frequency-format-val'}: " in message
    assert "classes with another number of images than 2: tiger shark (0), toilet paper in 999 (1); " in message
    assert message.endswith("numbers without an image: 7, 8.")


def test_rows_of_other_kinds_of_data_are_named() -> None:
    images = BenchmarkImages([b"1", b"2", b"3", b"4"], ["1.jpg", "2.jpg", "3.jpg", "4.jpg"])
    pairs = PairData(images, ["left", "right", "up", "down"], ["a", "b"])
    assert rows_of("mmvp-vlm", pairs, pairs=4, kinds=2) == (
        "In sets: the last of the pairs is number 2, 3.jpg 'up' and 'down'."
    )
    choices = HardNegativeData(images, torch.tensor([0, 3, 3]), ["a", "b", "b"], ["c", "d", "d"], ["x", "y", "y"])
    assert rows_of("winoground", pairs, pairs=1) == ""
    assert rows_of("sugarcrepe", choices, x=2, y=1) == (
        "In sets: the last of the x rows is number 1, 1.jpg 'a' and 'c'; repeated y rows: 4.jpg 'b' and 'd' "
        "(numbers 1, 2)."
    )
    assert rows_of("cra", CaptionPairData(["a", "b"], ["c", "d"]), pairs=3) == (
        "In sets: the last of the pairs is number 2, 'b' and 'd'."
    )
    nothing = RetrievalData.from_captions(BenchmarkImages([]), [])
    assert rows_of("docci", nothing, images=2, texts=2) == ""
    some = RetrievalData.from_captions(images, [["a"], ["b", "b"], [], ["d"]])
    assert rows_of("docci", some, queries=2) == "In sets: images without captions: 3.jpg."
    unnamed = ClassificationData(BenchmarkImages([b"1", b"2"]), torch.tensor([0, 1]), ["one", "two"])
    assert rows_of("cifar10", unnamed, images=4, classes=2) == ""
    archived = BenchmarkImages(ArchivedImages([FilePart(Path("no archive is read"), 0, 1)]), ["x"])
    assert "classes without images: two" in rows_of(
        "imagenet-r", ClassificationData(archived, torch.tensor([0]), ["one", "two"]), images=2, classes=2
    )


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
