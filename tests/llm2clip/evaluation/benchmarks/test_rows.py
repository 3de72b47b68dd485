"""Rows of YAML files of sets: what is refused, and what holds of every row of the package."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.benchmarks.rows import READERS, Files, read_sets
from llm2clip.evaluation.prompts import imagenet_classes, imagenet_subset
from llm2clip.evaluation.protocols import open_protocol

HUB = {"repo": "owner/name", "revision": 40 * "a", "files": ["test/*"], "megabytes": 1}
ROW: dict[str, Any] = {
    "title": "Mine", "protocol": "retrieval", "license": "mine", "source": "here", "hub": HUB,
    "read": {"layout": "webdataset", "answer": "txt"},
}  # fmt: skip


def sets(**changes: Any) -> Any:
    return read_sets(yaml.safe_dump({"mine": ROW | changes}), "mine.yaml")


def test_a_row_is_a_benchmark() -> None:
    benchmark = sets()["mine"]
    assert (benchmark.name, benchmark.title, benchmark.folder) == ("mine", "Mine", ".")
    assert benchmark.needs == ("test/nshards.txt", "dataset_type.txt")
    assert benchmark.hub.revision == 40 * "a"
    assert benchmark.read_train is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hub": HUB | {"revision": "f8af3ce"}}, "hub.revision: String should match pattern"),
        ({"hub": HUB | {"revision": "main"}}, "hub.revision"),
        ({"hub": HUB | {"repo": "name"}}, "hub.repo"),
        ({"titel": "Mine"}, "titel: Extra inputs are not permitted"),
        ({"groups": ["tall"]}, "groups.0"),
        ({"read": {"layout": "zip"}}, "read: .*'webdataset', 'parquet', 'files'"),
        ({"read": {"layout": "webdataset", "answer": "json"}}, "read.webdataset.answer"),
        ({"read": {"layout": "files", "reader": "urban2k", "needs": ["a"]}}, "'urban2k'; did you mean 'urban1k'"),
        ({"read": {"layout": "files", "reader": "dci", "needs": ["a"]}}, "reader dci: .*'caption'"),
        ({"read": None}, "give either read, or the sets of a mean"),
        ({"read": None, "sets": ["other"]}, "sets: other is no row above it"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_row_and_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"mine\.yaml, row mine: .*{message}"):
        sets(**changes)


def test_a_file_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mine\.yaml has no rows"):
        read_sets("- a", "mine.yaml")


def test_every_row_says_where_it_is_from_and_fetches_what_it_reads() -> None:
    for name, benchmark in all_benchmarks().items():
        assert benchmark.license, name
        assert benchmark.source, name
        open_protocol(benchmark.protocol, benchmark.options)
        if benchmark.hub is not None and not benchmark.hub.unpack:
            patterns = [re.compile(pattern.replace("*", ".*")) for pattern in benchmark.hub.with_train().files]
            for need in (*benchmark.needs, *benchmark.train_needs):
                assert any(pattern.match(need) or pattern.match(f"{need}/x") for pattern in patterns), (name, need)


def test_every_reader_is_used() -> None:
    readers = [getattr(benchmark.read, "__self__", None) for benchmark in all_benchmarks().values()]
    assert {layout.reader for layout in readers if isinstance(layout, Files)} == set(READERS)


def test_sets_of_imagenet_are_found_by_their_first_class() -> None:
    known = all_benchmarks()
    for name in "aro":
        assert known[f"imagenet-{name}"].needs == (imagenet_subset(name)[0],)
    assert known["imagenet-sketch"].needs == (next(iter(imagenet_classes())),)
