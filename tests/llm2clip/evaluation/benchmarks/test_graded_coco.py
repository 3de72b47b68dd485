"""Readers of ECCV Caption and CxC: Karpathy's file with the judgements of the package `eccv_caption`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm2clip.evaluation.benchmarks import all_benchmarks, graded_coco
from llm2clip.evaluation.graded_data import GradedData, eccv_caption
from tests.llm2clip.evaluation.benchmarks.samples import read, write

CORPUS: dict[int, list[int]] = eccv_caption().Metrics().coco_gts["i2t"]
# The first two images of the package, and one of another split.
IMAGES = [*list(CORPUS)[:2], 522418]


def file_name(image: int) -> str:
    return f"COCO_val2014_{image:012}.jpg"


def coco(folder: Path, images: list[int]) -> None:
    """Write Karpathy's file and the images; the first image has a sixth caption, which the package leaves out."""
    rows: list[dict[str, Any]] = []
    for image in images:
        ids = [*CORPUS.get(image, [1, 2, 3, 4, 5]), *([999_999_999] if image == images[0] else [])]
        sentences = [{"raw": f"caption {number} é ", "sentid": number, "tokens": []} for number in ids]
        row = {"filepath": "val2014", "filename": file_name(image), "cocoid": image}
        rows.append(row | {"split": "test" if image in CORPUS else "val", "sentids": ids, "sentences": sentences})
        write(folder / "val2014" / file_name(image))
    write(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})


def test_the_corpus_is_that_of_the_package_with_its_five_captions(tmp_path: Path) -> None:
    coco(tmp_path / "coco", IMAGES)
    data: GradedData = read("cxc-eccv", tmp_path)
    first, second = IMAGES[:2]
    assert data.image_ids == [first, second]
    assert data.text_ids == [*CORPUS[first], *CORPUS[second]]
    assert data.texts == [f"caption {number} é " for number in data.text_ids]
    assert data.owners.tolist() == [0] * 5 + [1] * 5
    assert data.images.images == [tmp_path / "coco/val2014" / file_name(image) for image in IMAGES[:2]]
    rated = eccv_caption().Metrics().cxc_gts
    assert data.image_qrels == {image: rated["i2t"][image] for image in (first, second)}
    assert data.text_qrels == {text: rated["t2i"][text] for text in data.text_ids if text in rated["t2i"]}


@pytest.mark.parametrize("name", ["eccv-caption", "cxc-eccv"])
def test_the_whole_set_has_the_published_counts(name: str, tmp_path: Path) -> None:
    coco(tmp_path / "coco", list(CORPUS))
    assert all_benchmarks()[name].differences(read(name, tmp_path).counts()) == []


def test_without_the_package_a_set_is_not_found_and_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco(tmp_path / "coco", IMAGES)
    benchmark = all_benchmarks()["eccv-caption"]
    assert benchmark.find(tmp_path) == tmp_path / "coco"
    monkeypatch.setattr(graded_coco, "find_spec", lambda name: None)
    assert benchmark.find(tmp_path) is None
    assert "pip install 'llm2clip[eccv]'" in benchmark.lacking(tmp_path)
