"""`llm2clip check-data --benchmark`: what would stop an evaluation is found without a model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from llm2clip import Benchmark, BenchmarkImages, DataPart, cli
from llm2clip.checks.check_benchmark import check_benchmark
from llm2clip.evaluation.benchmarks.checksum import data_checksum
from tests.llm2clip.checks.tokenizers import save_tokenizer
from tests.llm2clip.data.conftest import png
from tests.llm2clip.evaluation import captioned_set

CAPTIONS = {"a.png": ["a dog", "a dog", "一只狗"], "b.png": [""], "c.png": ["one two three four five"]}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Write a whole set; returns the folder of sets."""
    return captioned_set.write_set(tmp_path / "sets", CAPTIONS).parent


def check(tiny: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Run the command; returns its status and the report of the set."""
    output = tiny.parent / "report.json"
    arguments = ["--benchmark", captioned_set.__file__, "--data", str(tiny), "--output", str(output)]
    status = cli.main(["check-data", *arguments, *(options or ("--num-workers", "0"))])
    return status, json.loads(output.read_text())["benchmarks"]["tiny"]


def found(report: dict[str, Any]) -> dict[str, list[str]]:
    """Keys of the rows by finding, as file names."""
    return {
        name: [Path(example["key"]).name for example in finding["examples"]]
        for name, finding in report["findings"].items()
        if finding["count"]
    }


def test_a_whole_set(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    four = save_tokenizer(tiny.parent / "four", 4)
    status, report = check(tiny, "--tokenizer", four, f"{four}:100", "--num-workers", "1")
    assert (status, report["stops"]) == (0, [])
    assert report["counts"] == report["published"] == {"images": 3, "texts": 5}
    assert (report["rows"], report["usable_rows"], report["images"]["count"]) == (3, 3, 3)
    assert report["captions"]["scripts"] == {"latin": 3, "cjk": 1, "none": 1}
    assert {name: counts["cut"] for name, counts in report["tokens"].items()} == {four: 1, f"{four}:100": 0}
    assert found(report) == {
        "repeated captions": ["a.png"],
        "empty captions": ["b.png"],
        f"captions cut by {four}": ["c.png"],
    }
    shown = capsys.readouterr().out
    assert "Tiny, counts" in shown
    assert "cjk 1" in shown


def test_other_counts_stop_a_run(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captioned_set.write_set(tiny, {"a.png": ["a dog"] * 5})
    status, report = check(tiny)
    assert (status, report["stops"]) == (1, ["there are 1 images instead of 3."])
    shown, error = capsys.readouterr()
    assert "1 images instead of 3" in shown
    assert "tiny: there are 1 images instead of 3." in error
    assert "Traceback" not in error


def test_broken_images_stop_a_run_unless_images_are_left_out(tiny: Path) -> None:
    (tiny / "tiny" / "b.png").write_bytes(png(1)[:60])
    status, report = check(tiny)
    assert (status, report["stops"]) == (1, ["1 of 3 images cannot be used."])
    assert found(report)["broken images"] == ["b.png"]
    status, report = check(tiny, "--no-images")
    assert (status, report["images"]) == (0, None)


def test_a_broken_or_missing_file_stops_a_run(tiny: Path) -> None:
    (tiny / "tiny" / "captions.json").write_text("{")
    assert check(tiny)[0] == 1
    (tiny / "tiny" / "captions.json").unlink()
    status, report = check(tiny)
    assert status == 1
    assert "tiny lacks captions.json" in report["stops"][0]
    assert "counts" not in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "urban1k", "--data", "nowhere"], "--data nowhere is no folder"),
        (["--benchmark", "urban1k"], "urban1k lacks caption/1.txt, image in data/Urban1k"),
        (["mine", "--download"], "download is True, but it is for published sets"),
        (["--data", "somewhere"], "name them with --benchmark"),
        (["mine", "--benchmark", "urban1k", "--data", "."], "not both"),
        (["--benchmark", "urban1k", "--data", ".", "--split", "test"], "split is test, but it is for a SOURCE"),
        (["--benchmark", "urban1k", "--data", ".", "--on-error", "skip"], "on_error is skip, but it is for a SOURCE"),
    ],
)
def test_settings_that_contradict_each_other(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check-data", *arguments]) == 2
    assert message in capsys.readouterr().err


@dataclass
class Rated:
    """Images, each with a text and how well it fits."""

    images: BenchmarkImages
    texts: list[str]
    ratings: list[float]

    def counts(self) -> dict[str, int]:
        return {"ratings": len(self.ratings)}

    def parts(self) -> list[DataPart]:
        keys = [self.images.key(row) for row in range(len(self.images))]
        rows = list(zip(keys, self.texts, strict=True))
        return [DataPart(rows, ("texts",), self.images)]


def read_rated(folder: Path) -> Rated:
    return Rated(BenchmarkImages([folder / "a.png", folder / "b.png"]), ["a dog", "a dog"], [1.0, 0.5])


RATED = Benchmark(
    name="rated", title="Rated", groups=(), folder="rated", needs=("a.png",), files="a.png, b.png",
    counts={"ratings": 2}, license="yours", source="here", read=read_rated, protocol="none of these",
)  # fmt: skip


def test_data_of_a_strangers_class_are_counted_checked_and_identified(tmp_path: Path) -> None:
    """Counts and parts are all that messages, checksums and check-data ask for."""
    folder = tmp_path / "rated"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(png(1))
    data = read_rated(folder)
    assert RATED.differences(data.counts()) == []
    assert replace(RATED, counts={"ratings": 3}).differences(data.counts()) == ["2 ratings instead of 3"]
    assert (
        data_checksum(data) == data_checksum(read_rated(folder)) != data_checksum(replace(data, ratings=[1.0, 0.25]))
    )
    report = check_benchmark(RATED, tmp_path, num_workers=0)
    assert (report["stops"], report["counts"], report["rows"], report["usable_rows"]) == ([], {"ratings": 2}, 2, 2)
    assert report["findings"]["repeated captions"]["count"] == 1
