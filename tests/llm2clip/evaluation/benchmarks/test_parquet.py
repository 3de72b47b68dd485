"""Sets in parquet files, on samples with the columns of the copies on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.benchmarks.checksum import data_checksum
from llm2clip.evaluation.benchmarks.parquet import Parquet
from llm2clip.evaluation.prompts import template_set
from tests.llm2clip.evaluation.benchmarks import parquet_samples as samples
from tests.llm2clip.evaluation.benchmarks.samples import read, shades, write

SEVEN = [" Zwei Hunde.", "two dogs\n", "Two dogs", "", "two dogs", "TWO DOGS", "dogs, again"]
FILE = "data/test-00000-of-00001.parquet"


def test_captions_of_each_image_are_the_first_five_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "coco-karpathy" / FILE, samples.coco({42: SEVEN, 41: SEVEN[:2]}))
    data = read("coco-karpathy", tmp_path)
    assert data.texts == SEVEN[:5] + SEVEN[:2]
    assert data.owners.tolist() == [0] * 5 + [1] * 2
    assert data.images.key(0) == "42"
    assert shades(data.images) == [1, 11]
    pairs = read("cra", tmp_path)
    assert (pairs.queries, pairs.targets) == ([SEVEN[0]] * 2, [SEVEN[1]] * 2)


def test_files_of_several_shards_follow_each_other_by_name(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        write(tmp_path / f"docci/data/test-0000{number}-of-00002.parquet", samples.docci({name: f" {name}.\n é"}))
    data = read("docci", tmp_path)
    assert data.texts == [" a.\n é", " b.\n é"]
    assert [data.images.key(row) for row in range(2)] == ["a", "b"]


@pytest.mark.parametrize(("name", "label"), [("cifar10", "label"), ("cifar100", "fine_label")])
def test_labels_have_names_and_train_images(name: str, label: str, tmp_path: Path) -> None:
    write(tmp_path / name / "plain_text/test-00000-of-00001.parquet", samples.cifar([10, 20], [2, 0], label))
    write(tmp_path / name / "plain_text/train-00000-of-00001.parquet", samples.cifar([30], [1], label))
    data = read(name, tmp_path)
    assert (data.labels.tolist(), shades(data.images)) == ([2, 0], [10, 20])
    assert data.templates == template_set("openai-cifar")
    assert data.train is None
    probe = read(f"{name}-probe-sgd", tmp_path)
    assert (probe.train.labels.tolist(), shades(probe.train.images)) == ([1], [30])
    write(tmp_path / name / "plain_text/test-00000-of-00001.parquet", samples.cifar([10], [100], label))
    with pytest.raises(BenchmarkError, match=r"a label of .* is none of 10"):
        read(name, tmp_path)


def test_the_names_of_cifar_are_in_the_order_of_the_labels() -> None:
    names = {name: list(all_benchmarks()[name].read.__self__.names) for name in ("cifar10", "cifar100")}  # type: ignore[attr-defined]
    assert {name: len(set(some)) for name, some in names.items()} == {"cifar10": 10, "cifar100": 100}
    assert names["cifar100"] == sorted(names["cifar100"], key=lambda name: name.replace(" ", "_"))


def test_pairs_have_two_images_and_two_captions(tmp_path: Path) -> None:
    pairs = [("a café 0", " 0 café a"), ("a café 1", " 1 café a")]
    write(tmp_path / "winoground" / FILE, samples.winoground(pairs, ["Object", "Relation"]))
    data = read("winoground", tmp_path)
    assert data.texts == [*pairs[0], *pairs[1]]
    assert data.kinds == ["Object", "Relation"]
    assert shades(data.images) == [0, 4, 40, 44]
    assert data.counts() == {"pairs": 2, "kinds": 2}


def test_the_checksum_is_that_of_the_content(tmp_path: Path) -> None:
    sums = []
    for place, text in (("a", "x"), ("b", "x"), ("c", "y")):
        write(tmp_path / place / "docci" / FILE, samples.docci({"one": text, "two": "z"}))
        sums.append(data_checksum(read("docci", tmp_path / place)))
    assert sums[0] == sums[1] != sums[2]


def test_a_missing_column_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "docci" / FILE, samples.parquet({"image": [b"1"], "text": ["x"]}))
    with pytest.raises(BenchmarkError, match="has no column description, example_id; it has image, text"):
        read("docci", tmp_path)
    path.write_bytes(samples.docci({"a": "b"})[:-50])
    with pytest.raises(BenchmarkError, match=r"DOCCI: a file in .* is damaged"):
        read("docci", tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give texts, or label"),
        ({"texts": "a", "label": "b", "names": ["c"]}, "give texts, or label"),
        ({"label": "b"}, "with the names of the classes"),
        ({"texts": ["a", "b"]}, "image and texts are two columns"),
    ],
)
def test_columns_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Parquet.model_validate({"layout": "parquet", "files": "*.parquet", "image": "image", **fields})
