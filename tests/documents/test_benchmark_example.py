"""The benchmark that docs/evaluate.md shows is a complete file: it is found, read and measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import choose_benchmarks
from llm2clip.evaluation.protocols import open_protocol
from tests.documents.stand_ins import FILES, FOLDERS
from tests.llm2clip.evaluation.fake_session import FakeSession


def test_documented_benchmark_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "museum.py"
    FILES["museum.py"](file)
    assert len(file.read_text().splitlines()) <= 40
    FOLDERS["data/museum"](tmp_path / "museum")
    (benchmark,) = choose_benchmarks([str(file)], tmp_path)
    folder = benchmark.find(tmp_path)
    assert folder == tmp_path / "museum"
    data = benchmark.read(folder)
    assert data.counts() == benchmark.counts
    assert data.texts == [" a vase, Greek", "a vase", "ein Käfer aus Gold", "a vase", ""]
    assert data.owners.tolist() == [0, 0, 1, 2, 2]
    texts = {" a vase, Greek": [1, 0], "a vase": [1, 0], "ein Käfer aus Gold": [0, 1], "": [1, 1]}
    measured = open_protocol(benchmark.protocol, benchmark.options).measure(
        FakeSession([[1, 0], [0, 1], [1, 1]], texts), data
    )
    # Of the rows, "a vase" of the third image finds the first one.
    assert measured.scores["text_to_image_recall@1"] == pytest.approx(4 / 5)
    (folder / "images/beetle.png").unlink()
    with pytest.raises(BenchmarkError, match=r"Museum lacks 1 of 3 images: .*beetle\.png"):
        benchmark.read(folder)
