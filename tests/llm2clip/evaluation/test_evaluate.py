"""`llm2clip evaluate`: benchmarks on small stand-ins, lists and errors."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip import cli
from llm2clip.command_line.stopping import INTERRUPTED
from llm2clip.encoders import load_encoder
from llm2clip.evaluation.benchmarks import all_benchmarks, choose_benchmarks
from llm2clip.evaluation.evaluate_config import OWN_DATA
from llm2clip.evaluation.metrics import retrieval_metrics
from llm2clip.evaluation.session import Session
from tests.builders import tiny
from tests.llm2clip.evaluation.strange import STRANGE
from tests.llm2clip.trainers.stages import interrupt
from tests.processes import run_ranks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `strange.py`, the data of its benchmark in `data`, and a small `model`."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "strange.py").write_text(STRANGE)
    odd = STRANGE.replace('title="Strange"', 'title="Odd"').replace('"images": 11', '"images": 12')
    (folder / "odd.py").write_text(odd)
    images = folder / "data" / "Strange"
    images.mkdir(parents=True)
    for number in range(11):
        tiny.IMAGES[number % 2].rotate(33 * number, expand=True).save(images / f"{number}.png")
    tiny.save(folder / "model")
    (folder / "pairs.csv").write_text("a,b\na dog,one dog\na cat,one cat\n")
    (folder / "lost.csv").write_text("image,caption\n1.png,a dog\n2.png,a cat\n1.png,a pet\n")
    (folder / "empty").mkdir()
    shutil.copy(folder / "model" / "config.json", folder / "empty")
    return folder


def command(place: Path, output: Path, *options: str) -> list[str]:
    paths = ["--benchmark", str(place / "strange.py"), "--data", str(place / "data"), "--output", str(output)]
    return ["evaluate", str(place / "model"), *paths, "--num-workers", "0", *options]


def result_of(output: Path) -> dict[str, Any]:
    [path] = output.glob("*.strange.*.json")
    return json.loads(path.read_text())


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("scores", "intervals", "counts", "groups", "data", "ranks"):
        assert found[name] == expected[name]


def test_a_strangers_benchmark_is_measured_printed_and_found_again(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(command(place, tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "T2I R@1" in shown
    assert "positives rows" in shown
    result = result_of(tmp_path)
    assert (result["counts"]["images"], result["counts"]["texts"], result["counts"]["empty_texts"]) == (11, 13, 1)
    assert 0 < result["scores"]["text_to_image_recall@10"] < 1
    assert result["model"]["given"] == str(place / "model")
    changed = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    # What is finished needs no folder that can be written.
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        assert cli.main(command(place, tmp_path)) == 0
    assert capsys.readouterr().out == shown
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == changed
    assert cli.main(command(place, tmp_path, "--overwrite")) == 0
    assert_equal(result_of(tmp_path), result)


def test_a_killed_evaluation_goes_on_with_the_same_numbers(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(place, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "embed_texts", interrupt)
        assert cli.main(arguments) == INTERRUPTED
    assert not list((tmp_path / "killed").glob("*.json"))
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.safetensors")}
    assert stored
    assert cli.main(arguments) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in stored.items())
    assert cli.main(command(place, tmp_path / "whole")) == 0
    assert_equal(result_of(tmp_path / "killed"), result_of(tmp_path / "whole"))


def test_compact_embeddings_are_measured_as_a_database_compares_them(place: Path, tmp_path: Path) -> None:
    assert cli.main(command(place, tmp_path, "--truncate-dim", "16", "--precision", "binary")) == 0
    result = result_of(tmp_path)
    assert (result["model"]["truncate_dim"], result["model"]["precision"]) == ("16", "binary")
    [benchmark] = choose_benchmarks([str(place / "strange.py")], place / "data")
    data = benchmark.read(place / "data" / "Strange")
    encoder = load_encoder(str(place / "model"))
    images = torch.cat([part.rows for part in encoder.encode_image_parts(data.images, range(11))])
    rows = [images, encoder.encode_text(data.texts)]
    signs = [torch.where(some[:, :16] > 0, 1.0, -1.0) for some in rows]
    wanted = retrieval_metrics(signs[0], signs[1], data.pairs)
    assert all(wanted[name] == pytest.approx(score) for name, score in result["scores"].items())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_several_processes_give_the_same_integers(processes: int, place: Path, tmp_path: Path) -> None:
    run_ranks(["-m", "llm2clip", *command(place, tmp_path / "several")], processes)
    assert cli.main(command(place, tmp_path / "one")) == 0
    several, one = result_of(tmp_path / "several"), result_of(tmp_path / "one")
    assert (several["processes"], one["processes"]) == (processes, 1)
    assert_equal(several, one)


def test_the_list_is_short_and_has_details_of_what_is_chosen(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(place / "data")]
    assert cli.main(["evaluate", "--list", *data]) == 0
    lines = capsys.readouterr().out.splitlines()
    known = all_benchmarks()
    assert len(lines) == len(known) + 3
    [line] = [line for line in lines if line.startswith("urban1k ")]
    assert re.split(r"\s{2,}", line)[:4] == ["urban1k", "no", "long, paper", "1,000 images, 1,000 texts"]
    # A group shows all of its sets, whether they are there or not.
    assert cli.main(["evaluate", "--list", *data, "--benchmark", "long", str(place / "strange.py")]) == 0
    shown = capsys.readouterr().out
    assert f"found:   no, not below {place / 'data'}" in shown
    assert f"found:   in {place / 'data' / 'Strange'}" in shown
    assert f"urban1k  {known['urban1k'].title}" in shown
    assert f"license: {known['urban1k'].license}" in shown


def errors(place: Path) -> dict[str, tuple[list[str], str]]:
    strange, model, data = str(place / "strange.py"), str(place / "model"), ["--data", str(place / "data")]
    pairs, whole = str(place / "pairs.csv"), [model, "--benchmark", strange, *data]
    empty = str(place / "empty")
    of_own = {
        "task": "caption_retrieval", "positives": "rows", "split": "train", "image-column": "png",
        "caption-columns": "text",
    }  # fmt: skip
    assert {name.replace("-", "_") for name in of_own} | {"query_column", "target_column"} == set(OWN_DATA)
    captions = [model, "--benchmark", pairs, "--task", "caption_retrieval"]
    return {
        "unknown": ([model, "--benchmark", "urban2k", *data], "'urban2k'; did you mean 'urban1k'"),
        "missing": ([model, "--benchmark", "urban1k", *data], "urban1k lacks caption/1.txt, image in"),
        "folder": ([model, "--benchmark", "urban1k", "--data", "nowhere"], "--data nowhere is no folder"),
        # Names are looked up before data are read, also of the last model.
        "model": ([model, "no-model", "--benchmark", "urban1k", *data], "there is no model no-model here"),
        "function": ([model, "no.py:load", "--benchmark", "urban1k", *data], "the file no.py does not exist"),
        # A folder without weights: counts and files are checked before a model is loaded.
        "counts": ([empty, "--benchmark", str(place / "odd.py"), *data], "has 11 images instead of 12"),
        "output": ([empty, *whole[1:], "--output", strange], "strange.py cannot be a folder"),
        "images": ([empty, "--benchmark", str(place / "lost.csv")], "lost.csv lacks 2 images that it names: "),
        "nothing": ([model, *data], "evaluate needs a model and what to measure"),
        "format": ([*whole, "--text-format", "upper"], "text_format is 'upper'"),
        "batch": ([*whole, "--batch-size", "0"], "batch_size must be at least 1, not 0"),
        **{name: ([*whole, f"--{name}", value], "but none of strange is your own data by path")
           for name, value in of_own.items()},
        "one column": ([*captions, "--query-column", "a"], "query_column and target_column go together"),
        "rows": ([*captions, "--positives", "rows"], "in caption_retrieval equal texts are one query, and one target"),
        "image": ([*captions, "--image-column", "png"], "caption_retrieval reads no images: leave it out"),
        "split": ([model, "--benchmark", pairs, "--split", "validation"], "is a file, whose only split is train"),
        "skip": ([*captions, "--caption-columns", "a", "b", "--on-error", "skip"], "pairs.csv needs every image"),
    }  # fmt: skip


def test_a_group_is_that_whatever_folders_there_are(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long").mkdir()
    assert cli.main(["evaluate", str(place / "model"), "--benchmark", "long", "--data", str(place / "data")]) == 2
    assert "no files of a benchmark of long were found" in capsys.readouterr().err


@pytest.mark.parametrize("name", errors(Path()))
def test_a_mistake_is_one_line(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = errors(place)[name]
    assert cli.main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())
