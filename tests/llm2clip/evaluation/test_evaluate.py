"""`llm2clip evaluate`: benchmarks on small stand-ins, one's own data by both rules, errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from llm2clip import cli
from llm2clip.data import CaptionSource
from llm2clip.evaluation import ImageTextRetrieval
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.utils.manifests import write_manifest
from tests.damage import flip
from tests.modeling_llm2clip import tiny
from tests.processes import run_python, run_ranks

# A stranger's benchmark: eleven images, thirteen captions of which three are equal and one is empty.
STRANGE = '''
import os
import signal

from llm2clip.evaluation.benchmarks.base import Benchmark
from llm2clip.evaluation.benchmarks.data import BenchmarkImages, RetrievalData
from llm2clip.evaluation.protocols.retrieval import RetrievalProtocol

WORDS = "red blue small old dog cat bus tree street park snow".split()


def read(folder):
    images = BenchmarkImages([folder / f"{number}.png" for number in range(11)]).require_files("Strange")
    captions = [[f"a {word} {WORDS[number - 3]}"] for number, word in enumerate(WORDS)]
    captions[4] += ["a red park", ""]
    captions[7] = ["a red park"]
    return RetrievalData.from_captions(images, captions)


class Protocol(RetrievalProtocol):
    """Kills its process between images and texts if it is told to."""

    def measure(self, session, data):
        session.embed_images(data.images)
        if os.environ.get("KILL_EVALUATION"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().measure(session, data)


BENCHMARKS = [
    Benchmark(
        name="strange", title="Strange", groups=("short",), folder="Strange", marker="0.png", files="0.png to 10.png",
        counts={"images": 11, "texts": 13}, license="MIT", source="here", read=read, protocol=Protocol(),
    )
]
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `strange.py`, the data of its benchmark in `benchmarks`, and a small `model`."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "strange.py").write_text(STRANGE)
    odd = STRANGE.replace('title="Strange"', 'title="Odd"').replace('"images": 11', '"images": 12')
    (folder / "odd.py").write_text(odd)
    images = folder / "benchmarks" / "Strange"
    images.mkdir(parents=True)
    for number in range(11):
        tiny.IMAGES[number % 2].rotate(33 * number, expand=True).save(images / f"{number}.png")
    tiny.save(folder / "model")
    return folder


def command(place: Path, output: Path, *options: str) -> list[str]:
    data = str(place / "benchmarks")
    paths = ["--benchmark", str(place / "strange.py"), "--data", data, "--output", str(output)]
    return ["evaluate", str(place / "model"), *paths, "--num-workers", "0", *options]


def result_of(output: Path) -> dict[str, Any]:
    [path] = output.glob("*.strange.*.json")
    return json.loads(path.read_text())


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
    again = result_of(tmp_path)
    for name in ("scores", "intervals", "counts", "groups", "data"):
        assert again[name] == result[name]


def test_a_killed_evaluation_goes_on_with_the_same_numbers(place: Path, tmp_path: Path) -> None:
    arguments = command(place, tmp_path / "killed")
    killed = run_python(["-m", "llm2clip", *arguments], check=False, KILL_EVALUATION="1")
    assert killed.returncode == -signal.SIGKILL
    assert not list((tmp_path / "killed").glob("*.json"))
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.safetensors")}
    assert stored
    assert cli.main(arguments) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in stored.items())
    assert cli.main(command(place, tmp_path / "whole")) == 0
    continued, whole = result_of(tmp_path / "killed"), result_of(tmp_path / "whole")
    for name in ("scores", "intervals", "counts", "groups", "data"):
        assert continued[name] == whole[name]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_several_processes_give_the_same_integers(processes: int, place: Path, tmp_path: Path) -> None:
    run_ranks(["-m", "llm2clip", *command(place, tmp_path / "several")], processes)
    assert cli.main(command(place, tmp_path / "one")) == 0
    several, one = result_of(tmp_path / "several"), result_of(tmp_path / "one")
    assert (several["processes"], one["processes"]) == (processes, 1)
    for name in ("scores", "intervals", "counts", "groups", "data"):
        assert several[name] == one[name]


def test_the_list_is_short_and_has_details_of_what_is_chosen(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(place / "benchmarks")]
    assert cli.main(["evaluate", "--list", *data]) == 0
    lines = capsys.readouterr().out.splitlines()
    known = all_benchmarks()
    assert len(lines) == len(known) + 3
    [line] = [line for line in lines if line.startswith("urban1k ")]
    assert re.split(r"\s{2,}", line) == [
        "urban1k", "no", "long, paper", "1,000 images, 1,000 texts", known["urban1k"].license,
    ]  # fmt: skip
    assert lines[-1].startswith(f"0 of {len(known)} are below {place / 'benchmarks'}. `llm2clip evaluate --list --ben")
    # A group shows all of its sets, whether they are there or not.
    assert cli.main(["evaluate", "--list", *data, "--benchmark", "long", str(place / "strange.py")]) == 0
    shown = capsys.readouterr().out
    assert "urban1k  Urban1k" in shown
    assert f"found:   no, not below {place / 'benchmarks'}" in shown
    assert f"found:   in {place / 'benchmarks' / 'Strange'}" in shown
    assert "fashion-mnist" not in shown


def test_a_line_of_the_list_is_cut_at_the_width_of_a_terminal(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["evaluate", "--list"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines()[:-1])) > 60
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["evaluate", "--list"]) == 0
    assert {len(line) for line in capsys.readouterr().out.splitlines()[:-2]} == {60}


def errors(place: Path) -> dict[str, tuple[list[str], str]]:
    strange, data = str(place / "strange.py"), ["--data", str(place / "benchmarks")]
    model = str(place / "model")
    return {
        "unknown": (
            [model, "--benchmark", "urban2k", *data],
            "there is no benchmark 'urban2k'; did you mean 'urban1k'?",
        ),
        "missing": ([model, "--benchmark", "urban1k", *data], "urban1k lacks caption/1.txt, image in"),
        "folder": ([model, "--benchmark", "urban1k", "--data", "nowhere"], "--data nowhere is no folder"),
        "default": ([model, "--benchmark", strange], "--data benchmarks is no folder"),
        # A folder that is no model: counts are checked before a model is loaded.
        "counts": ([str(place), "--benchmark", str(place / "odd.py"), *data], "Odd has 11 images instead of 12"),
        "output": ([str(place), "--benchmark", strange, *data, "--output", strange], f"because {strange} is a file"),
        "own_output": ([model, *data, "--output", str(place)], "output is the folder "),
        "own_file": ([model, *data, "--output", f"{strange}/own.json"], f"because {strange} is a file"),
        "other_file": ([model, *data, "--output", strange], "strange.py exists and is no result of evaluate"),
        "no_model": (["--benchmark", strange, *data], "evaluate needs model"),
        "format": ([model, "--benchmark", strange, *data, "--text-format", "upper"], "text format 'upper' is unknown"),
        "own": ([model, "--benchmark", strange, *data, "--split", "train"], "--split is for your own data, not with"),
        "protocol": ([model, "--benchmark", strange, *data, "--protocol", "rows"], "--protocol is for your own data"),
        "benchmark": ([model, *data, "--allow-counts"], "--allow-counts is for use with --benchmark"),
        "captions": ([model, *data, "--task", "caption_retrieval", "--protocol", "rows"], "has no protocol rows"),
        "mapping": ([model, "--benchmark", strange, "--data", "{path: x}"], "data has to be the folder of the bench"),
    }


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


def test_images_that_are_missing_are_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "benchmarks" / "Strange"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    arguments = ["evaluate", str(place / "model"), "--benchmark", str(place / "strange.py"), "--output", str(tmp_path)]
    assert cli.main([*arguments, "--data", str(tmp_path / "benchmarks")]) == 2
    assert "Strange lacks 10 of 11 images: " in capsys.readouterr().err


@pytest.fixture
def own_data(tmp_path: Path) -> str:
    """Three images of which two share a caption; the third has one caption twice, in other case."""
    rows = {"image": tiny.IMAGES[:1] * 3, "caption": [["a dog", "a cat"], ["a dog"], ["a bus", "a bus", "A Bus", ""]]}
    columns = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    datasets.Dataset.from_dict(rows, columns).to_parquet(tmp_path / "test.parquet")
    return str(tmp_path / "test.parquet")


def test_rows_of_own_data_are_queries_with_one_right_image(own_data: str) -> None:
    source = CaptionSource(own_data, split="test", caption_columns=["caption"])
    processor = tiny.processor().image_processor
    rows = ImageTextRetrieval(source, processor, positives="rows")
    assert rows.captions == ["a dog", "a cat", "a dog", "a bus", "a bus", "A Bus"]
    assert rows.matches(range(3)).tolist() == [[0, 0], [1, 0], [2, 1], [3, 2], [4, 2], [5, 2]]
    # The second image was skipped.
    assert rows.matches([0, 2]).tolist() == [[0, 0], [1, 0], [3, 1], [4, 1], [5, 1]]
    distinct = ImageTextRetrieval(source, processor)
    assert distinct.captions == ["a dog", "a cat", "a bus", "A Bus"]
    assert [0, 1] in distinct.matches(range(3)).tolist()


def test_own_data_is_measured_with_whole_models_of_ours(
    place: Path, own_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(place / "model", tmp_path / "model")
    write_manifest(model, "stage2")
    with flip(model / "model.safetensors"):
        assert cli.main(["evaluate", str(model), "--data", own_data, "--caption-columns", "caption"]) == 2
    assert "is not what was written (model.safetensors has changed" in capsys.readouterr().err
    assert cli.main(["evaluate", "mine.py:load", "--data", own_data]) == 2
    assert "mine.py:load is measured with --benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "texts"), [([], 4), (["--protocol", "distinct"], 4), (["--protocol", "rows"], 6)])
def test_the_protocol_of_own_data_is_printed_and_written(
    options: list[str], texts: int, place: Path, own_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    arguments = ["evaluate", str(place / "model"), "--data", own_data, "--caption-columns", "caption"]
    assert cli.main([*arguments, "--output", str(result), *options]) == 0
    protocol = "rows" if "rows" in options else "distinct"
    assert f"protocol: {protocol}\n" in capsys.readouterr().out
    written = json.loads(result.read_text())
    assert (written["protocol"], written["num_texts"]) == (protocol, texts)
