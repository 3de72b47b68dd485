"""The suite: results on disk, found again, refused if they are of something else, and the errors of missing files."""

from __future__ import annotations

import errno
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llm2clip.evaluation import suite
from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.checksum import data_checksum
from llm2clip.evaluation.benchmarks.data import BenchmarkImages, RetrievalData
from llm2clip.evaluation.benchmarks.listing import DETAILS, list_benchmarks, overview
from llm2clip.evaluation.contracts import Measurement
from llm2clip.evaluation.protocols.retrieval import RetrievalProtocol
from llm2clip.evaluation.results import Result, intervals_of, read_result, result_path
from llm2clip.evaluation.results_table import print_results
from llm2clip.evaluation.suite import FoundBenchmark, Suite, find_benchmarks
from llm2clip.utils.files import write_json
from llm2clip.utils.tables import short_name
from tests.llm2clip.evaluation.fake_session import FakeEncoder, FakeSession

TEXTS = {"a dog": [1.0, 0.0], "a red cat that sleeps": [0.0, 1.0], "a bird": [1.0, 0.2], "": [0.0, 1.0]}


def read(folder: Path) -> RetrievalData:
    rows = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    images = BenchmarkImages([folder / row["image"] for row in rows])
    return RetrievalData.from_captions(images, [row["captions"] for row in rows])


BENCHMARK = Benchmark(
    name="tiny", title="Tiny set", groups=("short", "paper"), folder="Tiny", marker="captions.json",
    files="captions.json, images", counts={"images": 2, "texts": 3}, license="MIT", source="This test.",
    read=read, protocol=RetrievalProtocol(), more_markers=("images",), note="A trap.",
)  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "Tiny"
    (folder / "images").mkdir(parents=True)
    rows = [
        {"image": "images/0.png", "captions": ["a dog", "a bird"]},
        {"image": "images/1.png", "captions": ["a red cat that sleeps"]},
    ]
    for row in rows:
        (folder / row["image"]).write_bytes(row["image"].encode())
    (folder / "captions.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def session(name: str = "models/tiny one", **options: Any) -> FakeSession:
    return FakeSession([[1.0, 0.0], [0.0, 1.0]], FakeEncoder(TEXTS, name=name, max_words=3), **options)


def run(data: Path, output: Path, model: FakeSession | None = None, **options: Any) -> Result:
    [result] = Suite(output, **options).run(find_benchmarks([BENCHMARK], data), model or session())
    return result


def test_a_result_says_all_that_is_needed_to_compare_it(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out")
    path = tmp_path / "out" / "models--tiny--one.tiny.raw.json"
    found = json.loads(path.read_text())
    assert next(iter(found)) == "schema_version"
    assert found["model"] == {
        "given": "models/tiny one", "library": "tests", "name": "models/tiny one", "revision": "0" * 40,
        "dtype": "float32", "fingerprint": "models/tiny one",
    }  # fmt: skip
    assert found["scores"]["text_to_image_recall@1"] == 1.0
    assert found["intervals"]["text_to_image_recall@1"] == [1.0, 1.0]
    assert found["protocol"]["positives"] == "rows"
    assert found["protocol"]["text_format"] == "raw"
    assert (found["counts"]["texts"], found["counts"]["truncated_texts"]) == (3, 1)
    assert found["groups"]["length"]["0-16"]["texts"] == 3
    assert found["data"] == {"folder": str(data / "Tiny"), "checksum": data_checksum(read(data / "Tiny"))}
    assert set(found["versions"]) == {"llm2clip", "python", "torch", "transformers", "numpy"}
    assert set(found["seconds"]) == {"read", "images", "texts", "measure", "intervals"}
    assert (found["processes"], found["differences"]) == (1, [])
    del found["manifest_checksum"]
    assert read_result(path) == Result(**found)


def test_a_changed_score_is_refused(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out")
    path = tmp_path / "out" / "models--tiny--one.tiny.raw.json"
    found = json.loads(path.read_text())
    found["scores"]["text_to_image_recall@1"] = 0.5
    write_json(path, found)
    with pytest.raises(
        ValueError, match=r"has changed since it was written.*delete its manifest_checksum.*--overwrite"
    ):
        run(data, tmp_path / "out")
    del found["manifest_checksum"]
    write_json(path, found)
    assert read_result(path).scores["text_to_image_recall@1"] == 0.5


def test_a_finished_result_is_found_again_and_overwritten_on_demand(data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path / "out")
    again = session()
    assert run(data, tmp_path / "out", again) == first
    assert again.embedded == []
    run(data, tmp_path / "out", again, overwrite=True)
    assert again.embedded
    lower = session(text_format=str.lower)
    run(data, tmp_path / "out", lower, text_format="lower")
    assert lower.embedded
    assert len(list((tmp_path / "out").glob("*.json"))) == 2


def test_a_result_of_something_else_is_not_taken_for_this_one(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out")
    other = session()
    other.encoder.fingerprint = lambda: "trained on"  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"tiny\.raw\.json is a finished .* change of the weights or preprocessing"):
        run(data, tmp_path / "out", other)
    (data / "Tiny" / "images" / "0.png").write_bytes(b"another image")
    with pytest.raises(ValueError, match=r"change of the data\. --overwrite replaces it; another --output keeps both"):
        run(data, tmp_path / "out")
    changed = replace(BENCHMARK, protocol=Halves())
    with pytest.raises(ValueError, match="change of the data and of the options of the protocol"):
        Suite(tmp_path / "out").run([FoundBenchmark(changed, data / "Tiny")], session())


class Halves:
    """A stranger's protocol whose values do not belong to its score."""

    def measure(self, session: object, data: object) -> Measurement:
        return Measurement({"name": "halves"}, {"half": 0.5}, values={"half": torch.tensor([1.0, 1.0])})


def test_values_that_do_not_average_to_the_score_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"values of half average to 1\.0, but its score is 0\.5"):
        intervals_of(Halves().measure(None, None))
    parts = Measurement({}, {"a": 0.5}, {"a": torch.tensor([1.0, 0.0, 0.0])}, {"a": torch.tensor([4, 9, 9])})
    assert intervals_of(parts) == {"a": [0.5, 0.5]}


def test_counts_that_differ_are_refused_or_told(data: Path, tmp_path: Path) -> None:
    rows = [{"image": "images/0.png", "captions": ["a dog", "", "a bird", "a dog"]}]
    (data / "Tiny" / "captions.json").write_text(json.dumps(rows))
    with pytest.raises(
        BenchmarkError,
        match=r"Tiny set has 1 images instead of 2 \(1 too few\), 4 texts instead of 3 .*: images/0.png 'a dog' \(n",
    ):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = session()
    model.images = [[1.0, 0.0]]
    result = run(data, tmp_path / "out", model, allow_counts=True)
    assert result.differences == ["1 images instead of 2", "4 texts instead of 3"]
    console = Console(file=io.StringIO(), width=200)
    print_results(console, [result])
    assert (
        "Tiny set: 1 empty text; not the published set, 1 images instead of 2, 4 texts instead of 3."
        in console.file.getvalue()
    )  # type: ignore[attr-defined]


def test_the_seconds_of_reading_count_though_the_files_were_read_before(data: Path, tmp_path: Path) -> None:
    def slowly(folder: Path) -> RetrievalData:
        time.sleep(0.2)
        return read(folder)

    found = find_benchmarks([replace(BENCHMARK, read=slowly)], data)
    slow = Suite(tmp_path / "out")
    slow.check(found)
    [result] = slow.run(found, session())
    assert result.seconds["read"] >= 0.2


def test_missing_files_are_named_with_their_place(data: Path) -> None:
    assert find_benchmarks([BENCHMARK], data / "Tiny") == [FoundBenchmark(BENCHMARK, data / "Tiny")]
    (data / "Tiny" / "images").rename(data / "Tiny" / "pictures")
    with pytest.raises(BenchmarkError, match=r"tiny lacks images in .*/data/Tiny\. \(Source: This test\.\)"):
        find_benchmarks([BENCHMARK], data)
    several = replace(BENCHMARK, name="other", folder="Other", marker="a.txt", other_markers=("b*.txt",))
    with pytest.raises(BenchmarkError, match=r"tiny lacks .* other lacks a\.txt or b\*\.txt, images in .*/data\. "):
        find_benchmarks([BENCHMARK, several], data)
    own = replace(several, own_markers=("test.json",))
    with pytest.raises(BenchmarkError, match=r"other lacks a\.txt or b\*\.txt, images in .*/data\. "):
        find_benchmarks([own], data)
    (data / "Other").mkdir()
    with pytest.raises(BenchmarkError, match=r"other lacks a\.txt or b\*\.txt or test\.json, images in .*/Other\. "):
        find_benchmarks([own], data)
    with pytest.raises(BenchmarkError, match="nowhere is no folder"):
        find_benchmarks([BENCHMARK], data / "nowhere")


def test_results_of_other_schema_versions_are_refused(tmp_path: Path) -> None:
    path = result_path(tmp_path, "open_clip:ViT-B-32/laion400m", "tiny", "raw")
    assert path.name == "open_clip--ViT-B-32--laion400m.tiny.raw.json"
    assert result_path(tmp_path, "./runs/stage2/", "tiny", "raw").name == "runs--stage2.tiny.raw.json"
    for fields, message in (({}, "has no version"), ({"schema_version": 7}, "has version 7"),
                            ({"schema_version": 1, "benchmark": "a"}, "it lacks title, model")):  # fmt: skip
        write_json(path, fields)
        with pytest.raises(ValueError, match=message):
            read_result(path)


def test_a_plot_is_drawn_for_captions_of_several_lengths(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "short")
    assert not list((tmp_path / "short").glob("*.png"))
    model = session()
    model.encoder.text_lengths = lambda texts: (torch.tensor([5, 40, 90]), torch.zeros(3, dtype=torch.bool))  # type: ignore[method-assign]
    run(data, tmp_path / "long", model)
    [plot] = (tmp_path / "long").glob("*.png")
    assert plot.name == "models--tiny--one.tiny.raw.png"
    drawn = plot.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    plot.write_bytes(drawn[:100])
    run(data, tmp_path / "long", model)
    assert plot.read_bytes() == drawn


def test_a_result_that_cannot_be_written_is_not_finished(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "plot.png")

    monkeypatch.setattr(suite, "write_length_plot", full)
    with pytest.raises(OSError, match="No space left"):
        run(data, tmp_path / "out")
    # Otherwise it would be found as finished, and its plot never drawn.
    assert not list((tmp_path / "out").glob("*"))


def test_a_damaged_result_says_how_it_is_replaced(data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path / "out")
    [path] = (tmp_path / "out").glob("*.json")
    path.write_text(path.read_text()[:300])
    with pytest.raises(
        ValueError, match=r"raw\.json is not valid JSON: .* --overwrite measures again and replaces it"
    ):
        run(data, tmp_path / "out")
    assert run(data, tmp_path / "out", overwrite=True).scores == first.scores


def test_protocols_have_tables_of_their_own(data: Path, tmp_path: Path) -> None:
    raw = run(data, tmp_path)
    results = [raw, replace(raw, benchmark="b", title="Second set"), run(data, tmp_path, text_format="lower")]
    console = Console(file=io.StringIO(), width=200)
    print_results(console, results)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("T2I R@1 / 5 / 10") == 2
    assert shown.index("Second set") < shown.index("text format lower")
    assert "100.0-100.0" in shown
    assert "Second set: 1 text cut at its end." in shown
    assert short_name("mean_per_class") == "mean per class"


def test_the_list_tells_what_each_set_needs_and_whether_it_is_there(data: Path) -> None:
    other = replace(BENCHMARK, name="cats", groups=("classification",), folder="Cats", counts={}, note="")
    shown = list_benchmarks([other, BENCHMARK], data)
    assert shown.index("SHORT") < shown.index("tiny  Tiny set") < shown.index("CLASSIFICATION") < shown.index("cats")
    for text in (
        "groups:  short, paper", "counts:  2 images, 3 texts", "counts:  not published", "license: MIT",
        "files:   Tiny/: captions.json, images", "source:  This test.", "note:    A trap.",
        f"found:   in {data / 'Tiny'}",
    ):  # fmt: skip
        assert text in shown
    assert "found:" not in list_benchmarks([BENCHMARK], None)
    assert f"no, not below {data}/Tiny/images" in list_benchmarks([BENCHMARK], data / "Tiny" / "images")
    many = replace(other, counts={"images": 1, "texts": 2, "pairs": 3})
    assert overview([many, BENCHMARK], data).splitlines() == [
        "name  found  groups          counts                  license",
        "tiny  yes    short, paper    2 images, 3 texts       MIT",
        "cats  no     classification  1 images, 2 texts, ...  MIT",
        "",
        f"1 of 2 are below {data}. {DETAILS}",
    ]
