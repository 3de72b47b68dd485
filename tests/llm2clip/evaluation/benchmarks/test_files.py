"""Files of benchmarks are read exactly, and what is broken or missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm2clip.evaluation import reading
from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.files import find_images
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


def test_images_are_found_at_their_path_in_a_place_and_by_name(tmp_path: Path) -> None:
    there = write(tmp_path / "sam/images/1.jpg")
    place = write(tmp_path / "sam/2.jpg")
    deep = write(tmp_path / "other/part/3.jpg")
    images = find_images("Set", tmp_path, [f"sam/images/{number}.jpg" for number in (3, 1, 2)], ["sam"])
    assert images.images == [deep, there, place]
    assert images.key(0) == "sam/images/3.jpg"
    with pytest.raises(BenchmarkError, match=r"Set lacks 1 of 2 images: .*sam/images/4\.jpg"):
        find_images("Set", tmp_path, ["sam/images/1.jpg", "sam/images/4.jpg"])
    write(tmp_path / "copy/3.jpg")
    with pytest.raises(BenchmarkError, match=r"several files have the name of one image: 3\.jpg"):
        find_images("Set", tmp_path, ["sam/images/3.jpg"])


def test_a_set_in_one_of_its_forms_is_found(tmp_path: Path) -> None:
    fields = {"name": "several", "title": "Several", "folder": "sub", "read": read_json, "protocol": "retrieval"}
    several = Benchmark(**fields, needs=(("a.json", "data/*.parquet"),))
    assert several.find(tmp_path) is None
    write(tmp_path / "sub/data/test-00000.parquet")
    assert several.find(tmp_path) == several.find(tmp_path / "sub") == tmp_path / "sub"
