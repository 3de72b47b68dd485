"""Readers of ECCV Caption and CxC: Karpathy's split with the judgements of the package `eccv_caption`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.graded_data import GradedData, eccv_caption
from tests.llm2clip.evaluation.benchmarks import parquet_samples
from tests.llm2clip.evaluation.benchmarks.samples import read, write

CORPUS: dict[int, list[int]] = eccv_caption().Metrics().coco_gts["i2t"]
SHARD = "coco-karpathy/data/test-00000-of-00001.parquet"


def coco(data: Path, images: list[int]) -> None:
    """Write the images and captions with ids; the first image has a sixth caption, which the package leaves out."""
    ids = {image: [*CORPUS[image], *([999_999_999] if image == images[0] else [])] for image in images}
    texts = {image: [f"caption {number} é " for number in numbers] for image, numbers in ids.items()}
    write(data / SHARD, parquet_samples.coco(texts, ids))


def test_the_corpus_is_that_of_the_package_with_its_five_captions(tmp_path: Path) -> None:
    coco(tmp_path, list(CORPUS)[:2])
    data: GradedData = read("cxc-eccv", tmp_path)
    first, second = list(CORPUS)[:2]
    assert data.image_ids == [first, second]
    assert data.text_ids == [*CORPUS[first], *CORPUS[second]]
    assert data.texts == [f"caption {number} é " for number in data.text_ids]
    assert data.owners.tolist() == [0] * 5 + [1] * 5
    assert [data.images.key(row) for row in range(2)] == [str(first), str(second)]
    rated = eccv_caption().Metrics().cxc_gts
    assert data.image_qrels == {image: rated["i2t"][image] for image in (first, second)}
    assert data.text_qrels == {text: rated["t2i"][text] for text in data.text_ids if text in rated["t2i"]}


@pytest.mark.parametrize("name", ["eccv-caption", "cxc-eccv"])
def test_the_whole_set_has_the_published_counts(name: str, tmp_path: Path) -> None:
    coco(tmp_path, list(CORPUS))
    assert all_benchmarks()[name].differences(read(name, tmp_path).counts()) == []


def test_without_the_package_a_set_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco(tmp_path, list(CORPUS)[:2])
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(ImportError, match=r"pip install 'llm2clip\[eval\]'"):
        read("eccv-caption", tmp_path)
