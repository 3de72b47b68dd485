"""Readers of ECCV Caption and CxC, on samples in the exact file formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import graded_coco
from tests.llm2clip.evaluation.benchmarks import parquet_samples
from tests.llm2clip.evaluation.benchmarks.samples import read, write

# Image id, caption ids; the second image has six captions.
TEST = {391895: [10, 11, 12, 13, 14], 60623: [20, 21, 22, 23, 24, 25]}
SHARD = "coco-karpathy/data/test-00000-of-00001.parquet"


def coco(data: Path) -> None:
    """Write the images and captions with their ids."""
    write(
        data / SHARD,
        parquet_samples.coco({image: [f"caption {id_} é " for id_ in ids] for image, ids in TEST.items()}),
    )


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data of a stand-in of eccv_caption, which is not imported: that would read its numpy files."""
    monkeypatch.setattr(graded_coco, "PACKAGE", "eccv_caption_of_a_test")
    write(tmp_path / "site/eccv_caption_of_a_test/__init__.py", "raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    data = tmp_path / "site/eccv_caption_of_a_test/data"
    eccv(data)
    return data


def eccv(place: Path) -> None:
    """Write the json files of the package; its gallery leaves out caption 22 of the image with six."""
    five = {str(image): [caption for caption in ids if caption != 22] for image, ids in TEST.items()}
    write(place / "original_image_to_caption.json", five)
    write(place / "eccv_caption_to_image.json", {"20": [391895, 60623], "11": [60623]})
    write(place / "eccv_image_to_caption.json", {"391895": [25, 10, 10]})
    write(place / "cxc_caption_to_image.json", {"10": [391895], "25": [391895]})
    write(place / "cxc_image_to_caption.json", {"391895": [25, 10], "60623": [99]})


def test_eccv_caption_has_its_own_gallery_and_queries(package: Path, tmp_path: Path) -> None:
    coco(tmp_path)
    data = read("eccv-caption", tmp_path)
    numbers = [10, 11, 12, 13, 14, 20, 21, 23, 24, 25]
    assert data.texts == [f"caption {number} é " for number in numbers]
    assert data.owners.tolist() == [0] * 5 + [1] * 5
    assert [data.images.key(row) for row in range(2)] == [*map(str, TEST)]
    assert data.matches.tolist() == [[1, 1], [5, 0], [5, 1]]
    assert data.image_matches.tolist() == [[0, 0], [0, 9]]
    assert data.counts() == {
        "images": 2,
        "texts": 10,
        "text_queries": 2,
        "image_queries": 1,
        "right_images": 3,
        "right_texts": 2,
        "outside": 0,
    }


def test_eccv_caption_of_another_split_is_refused(package: Path, tmp_path: Path) -> None:
    coco(tmp_path)
    write(package / "original_image_to_caption.json", {"391895": [10, 77]})
    with pytest.raises(BenchmarkError, match="lack those of the ids 77"):
        read("eccv-caption", tmp_path)


def test_cxc_by_the_files_of_eccv_caption_has_rated_pairs_only(package: Path, tmp_path: Path) -> None:
    coco(tmp_path)
    data = read("cxc-eccv", tmp_path)
    assert data.matches.tolist() == [[0, 0], [9, 0]]
    assert data.image_matches.tolist() == [[0, 0], [0, 9]]
    assert data.outside == ["image 60623, caption 99"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco(tmp_path)
    monkeypatch.setattr(graded_coco, "PACKAGE", "eccv_caption_of_nobody")
    with pytest.raises(BenchmarkError, match="pip install eccv_caption_of_nobody"):
        read("eccv-caption", tmp_path)
