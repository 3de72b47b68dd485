"""Files of benchmarks are read exactly, and what is broken or missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip.evaluation import reading
from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.captions import find_images
from llm2clip.evaluation.reading import first_json_objects, read_json
from tests.llm2clip.evaluation.benchmarks.samples import write


@pytest.mark.parametrize("block", [8, 1 << 16])
def test_an_array_is_read_no_further_than_needed(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", block)
    rows = [{"caption": 'a, [b] {c} \\ " é'}, {"n": [1, {"m": 2}]}, {}]
    content = b"\xef\xbb\xbf \n" + json.dumps(rows, indent=1, ensure_ascii=False).encode()
    path = write(tmp_path / "a.json", content.rstrip(b"]") + b', {"cut')
    assert first_json_objects(path, 3) == rows
    with pytest.raises(BenchmarkError, match=r"item 3 of .* is cut short"):
        first_json_objects(path, 4)
    # A sample of a published file, which `--allow-counts` measures, ends earlier.
    for sample in (rows, []):
        assert first_json_objects(write(path, json.dumps(sample, indent=1).encode()), 4) == sample


def test_images_lie_in_the_folders_of_the_layout(tmp_path: Path) -> None:
    train, val = write(tmp_path / "train2014/1.jpg"), write(tmp_path / "val2014/2.jpg")
    images = find_images(tmp_path, ["2.jpg", "1.jpg"], ["train2014", "val2014"])
    assert images.images == [val, train]
    assert images.key(0) == "2.jpg"
    write(tmp_path / "other/3.jpg")
    with pytest.raises(BenchmarkError, match=r"lacks 1 of 2 images: .*train2014/3\.jpg"):
        find_images(tmp_path, ["1.jpg", "3.jpg"], ["train2014", "val2014"])


def test_a_set_is_found_in_its_folder_or_as_it(tmp_path: Path) -> None:
    benchmark = Benchmark(name="a", title="A", folder="sub", needs=("data/*.parquet",), read=read_json, protocol="x")
    assert benchmark.find(tmp_path) is None
    write(tmp_path / "data/test-00000.parquet")
    assert benchmark.find(tmp_path) is None
    write(tmp_path / "sub/data/test-00000.parquet")
    assert benchmark.find(tmp_path) == benchmark.find(tmp_path / "sub") == tmp_path / "sub"
