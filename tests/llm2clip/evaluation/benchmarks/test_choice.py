"""Which benchmarks a command stands for, and by which protocol each is measured."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from llm2clip.evaluation.benchmarks import ALL_FOUND, PROBES, all_benchmarks, choose_benchmarks
from llm2clip.evaluation.benchmarks.captions import XM3600_LANGUAGES
from llm2clip.evaluation.protocols import PROTOCOLS, open_protocol
from tests.llm2clip.evaluation.benchmarks.samples import write


def names(chosen: list[str], data: Path) -> list[str]:
    return [benchmark.name for benchmark in choose_benchmarks(chosen, data)]


def test_a_name_is_taken_whether_or_not_its_files_are_there(tmp_path: Path) -> None:
    assert names(["urban1k", "flickr30k", "urban1k"], tmp_path) == ["urban1k", "flickr30k"]
    with pytest.raises(ValueError, match="there is no benchmark, file or folder 'urban'"):
        names(["urban"], tmp_path)


@pytest.mark.parametrize(
    ("part", "meant"),
    [
        ("coco", "coco-salesforce, coco-salesforce-all, coco-karpathy, coco-val2017, coco-cn, coco-cn-translated, "),
        ("flickr", "flickr30k, flickr30k-whole, "),
        ("ImageNet1k", "imagenet-1k, imagenet-1k-single."),
        ("xm-3600", "xm3600, "),
    ],
)
def test_a_part_of_a_name_lists_the_benchmarks_that_may_be_meant(part: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no benchmark, file or folder '{part}'; you may mean {meant}"):
        names([part], tmp_path)


def test_a_group_stands_for_its_sets_that_are_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("test/nshards.txt", "dataset_type.txt"):
        write(tmp_path / "wds_mscoco_captions" / name, "")
    write(tmp_path / "xm3600/captions.jsonl", "")
    write(tmp_path / "xm3600/images/a.jpg", "")
    with caplog.at_level(logging.INFO, "llm2clip"):
        assert names(["short"], tmp_path) == ["coco-salesforce", "coco-salesforce-all"]
    assert "short without flickr30k, flickr30k-whole, coco-karpathy, coco-val2017, " in caplog.text
    in_languages = ["xm3600", "xm3600-without-english", "xm3600-first"]
    assert names([ALL_FOUND], tmp_path) == ["coco-salesforce", "coco-salesforce-all", *in_languages]
    assert names(["short", "docci"], tmp_path)[-1] == "docci"


@pytest.mark.parametrize("name", ["short", ALL_FOUND])
def test_a_group_of_which_nothing_is_there_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no files of a benchmark of {name} were found below {tmp_path}"):
        names(["urban1k", name], tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("imagenet-1k-single", {"templates": ("a photo of the {c}",)}),
        ("xm3600-without-english", {"mean_over": tuple(name for name in XM3600_LANGUAGES if name != "en")}),
        ("ade20k", {"scale": (2048, 512)}),
        ("ade20k-sliding", {"scale": (2048, 448), "crop": 448, "stride": 224}),
    ],
)
def test_a_name_stands_for_the_settings_of_its_published_numbers(name: str, options: dict[str, Any]) -> None:
    benchmark = all_benchmarks()[name]
    assert vars(open_protocol(benchmark.protocol, benchmark.options)).items() >= options.items()


def test_every_benchmark_has_a_protocol_that_takes_its_options() -> None:
    benchmarks = [*all_benchmarks().values(), *choose_benchmarks([f"cifar10-probe-{name}" for name in PROBES], Path())]
    for benchmark in benchmarks:
        protocol = open_protocol(benchmark.protocol, benchmark.options)
        assert vars(protocol).items() >= dict(benchmark.options).items(), benchmark.name
    assert {benchmark.protocol for benchmark in benchmarks} == set(PROTOCOLS)


def test_an_unknown_protocol_names_the_nearest_and_an_own_one_is_taken_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"there is no protocol 'retrival'.*retrieval"):
        open_protocol("retrival", {})
    own = open_protocol("retrieval", {})
    assert open_protocol(own, {"what": "ever"}) is own
