"""`evaluate()`: results on disk, found again, refused if they are of something else, for all kinds of data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.evaluation.benchmark import BenchmarkError, Measurement
from llm2clip.evaluation.benchmarks.checksum import data_checksum
from llm2clip.evaluation.data import ClassificationData
from llm2clip.evaluation.evaluate import evaluate, find_benchmarks
from llm2clip.evaluation.results import Result, read_result
from tests.llm2clip.evaluation.captioned_set import BENCHMARKS, read, write_set
from tests.llm2clip.evaluation.fake_session import FakeEncoder

TEXTS = {"a dog": [1.0, 0.0], "a red cat that sleeps": [0.0, 1.0], "a bird": [1.0, 0.2], "": [0.0, 1.0]}
FILE = "models--tiny--one.tiny.raw.json"


BENCHMARK = replace(BENCHMARKS[0], counts={"images": 2, "texts": 3})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_set(tmp_path / "data", {"0.png": ["a dog", "a bird"], "1.png": ["a red cat that sleeps"]}).parent


def encoder(**options: Any) -> FakeEncoder:
    return FakeEncoder([[1.0, 0.0], [0.0, 1.0]], TEXTS, **{"name": "models/tiny one", "max_words": 3, **options})


def run(data: Path, output: Path | None, model: FakeEncoder | None = None, **options: Any) -> Result:
    benchmark = options.pop("benchmark", BENCHMARK)
    place = None if output is None else str(output)
    [result] = evaluate(model or encoder(), benchmark, data=str(data), output=place, **options)
    return result


def test_a_result_says_all_that_is_needed_to_compare_it_and_is_found_again(data: Path, tmp_path: Path) -> None:
    result = run(data, tmp_path / "out")
    found = json.loads((tmp_path / "out" / FILE).read_text())
    assert found["model"] == {
        "given": "models/tiny one", "library": "tests", "name": "models/tiny one", "dtype": "float32",
        "fingerprint": "models/tiny one",
    }  # fmt: skip
    assert found["scores"]["text_to_image_recall@1"] == 1.0
    assert found["intervals"]["text_to_image_recall@1"] == pytest.approx([0.3424, 1], abs=1e-4)
    assert found["compared"] == ["image_to_text_recall@1", "text_to_image_recall@1"]
    assert found["protocol"]["id"] == "retrieval"
    assert (found["protocol"]["positives"], found["protocol"]["text_format"]) == ("rows", "raw")
    assert found["setup"] == {"protocol": "retrieval", "options": {"positives": None}, "text_format": "raw"}
    assert (found["counts"]["texts"], found["counts"]["truncated_texts"]) == (3, 1)
    assert found["ranks"]["text_to_image_mean_rank"] == 1.0
    assert found["groups"]["length"]["0-16"]["texts"] == 3
    assert found["data"] == {"folder": str(data / "tiny"), "checksum": data_checksum(read(data / "tiny"))}
    assert set(found["seconds"]) == {"read", "images", "texts", "measure", "intervals"}
    assert (found["processes"], found["differences"]) == (1, [])
    assert read_result(tmp_path / "out" / FILE) == result
    again = encoder()
    assert run(data, tmp_path / "out", again) == result
    run(data, tmp_path / "out", again, overwrite=True)
    assert again.embedded == [], "rows are stored"
    run(data, tmp_path / "out", again, text_format="flair")
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
    # The same without a place.
    in_memory = run(data, None)
    assert replace(in_memory, seconds=result.seconds) == result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


class Halves:
    """A stranger's protocol."""

    def measure(self, session: object, data: object) -> Measurement:
        return Measurement({"name": "halves"}, {"half": 0.5})


def test_a_result_of_something_else_is_not_taken_for_this_one(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out")
    other = encoder()
    other.fingerprint, other.dtype = lambda: "trained on", "float16"  # type: ignore[method-assign]
    words = r"tiny\.raw\.json is a finished .* change of the weights or preprocessing of the model and of the dtype"
    with pytest.raises(ValueError, match=words):
        run(data, tmp_path / "out", other)
    (data / "tiny" / "0.png").write_bytes(b"another image")
    with pytest.raises(ValueError, match=r"change of the data\. --overwrite replaces it; another --output keeps both"):
        run(data, tmp_path / "out")
    with pytest.raises(ValueError, match="change of the data and of the options of the protocol"):
        run(data, tmp_path / "out", benchmark=replace(BENCHMARK, protocol=Halves()))


def test_a_damaged_result_says_how_it_is_replaced(data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path / "out")
    path = tmp_path / "out" / FILE
    path.write_text(path.read_text()[:300])
    with pytest.raises(ValueError, match=r"raw\.json is not valid JSON: .* --overwrite measures again and replaces"):
        run(data, tmp_path / "out")
    assert run(data, tmp_path / "out", overwrite=True).scores == first.scores


def test_counts_that_differ_are_refused_or_told(data: Path, tmp_path: Path) -> None:
    write_set(data, {"0.png": ["a dog", "", "a bird", "a dog"]})
    with pytest.raises(
        BenchmarkError,
        match=r"Tiny in .* has 1 images instead of 2, 4 texts instead of 3: its numbers .* With --allow-counts",
    ):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = run(data, tmp_path / "out", FakeEncoder([[1.0, 0.0]], TEXTS), allow_counts=True)
    assert result.differences == ["1 images instead of 2", "4 texts instead of 3"]
    assert result.counts["empty_texts"] == 1


def test_missing_files_are_named_with_their_place(data: Path) -> None:
    assert find_benchmarks([BENCHMARK], data / "tiny") == [(BENCHMARK, data / "tiny")]
    (data / "tiny" / "captions.json").unlink()
    with pytest.raises(BenchmarkError, match=r"tiny lacks captions\.json in .*/data/tiny\. \(Source: This test\.\)"):
        find_benchmarks([BENCHMARK], data)
    several = replace(BENCHMARK, name="other", folder="Other", needs=("b*.txt", "images"))
    with pytest.raises(BenchmarkError, match=r"tiny lacks .* other lacks b\*\.txt, images in .*/data/Other\. "):
        find_benchmarks([BENCHMARK, several], data)


def test_a_text_format_does_not_change_prompts_of_classes(data: Path) -> None:
    def classes(folder: Path) -> ClassificationData:
        return ClassificationData(read(folder).images, torch.tensor([0, 1]), ["A dog", "A bird"], ["{c}"])

    benchmark = replace(BENCHMARK, name="classes", counts={}, read=classes, protocol="zero-shot-classification")
    model = FakeEncoder([[1.0, 0.0], [0.0, 1.0]], {**TEXTS, "A dog": [1.0, 0.0], "A bird": [0.0, 1.0]})
    alone = run(data, None, model, benchmark=benchmark)
    with pytest.raises(ValueError, match="text_format is lower, but classes has no captions: leave it out"):
        run(data, None, model, benchmark=benchmark, text_format="lower")
    found = evaluate(model, [benchmark, BENCHMARK], data=str(data), text_format="lower")
    assert [one.setup["text_format"] for one in found] == ["raw", "lower"]
    assert replace(found[0], seconds=alone.seconds) == alone
