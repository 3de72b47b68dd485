"""The same call again and again: memory, open files, threads and tensors stay what they are."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradio_client import handle_file

from llm2clip import cli
from tests.builders import small_runs, tiny
from tests.examples.server import open_page, served
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import embedded, source, write_tars
from tests.processes import run_python
from tests.soak.measure import Level, Soak

pytestmark = pytest.mark.slow
CAPTIONS = [f"picture {number} of a dog" for number in range(7)]


def soaked(name: str, *arguments: Path | str) -> Soak:
    """Run a program in a process of its own, so that nothing else is measured."""
    command = ["-m", "tests.soak.programs", name, *map(str, arguments)]
    output = run_python(command, PYTHONPATH=os.pathsep.join(sys.path)).stdout
    measured = json.loads(output.splitlines()[-1])
    return Soak(measured["calls"], [Level(**level) for level in measured["levels"]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("soak") / "model"
    tiny.save(folder)
    return folder


def write_pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        tiny.IMAGES[number % 2].rotate(6 * number, expand=True).save(path)
    return paths


@pytest.mark.parametrize("name", ["encode_text", pytest.param("encode_image", marks=pytest.mark.nightly)])
def test_embedding_holds_nothing(name: str, model: Path) -> None:
    assert soaked(name, model).faults(name) == []


@pytest.mark.nightly
def test_an_open_index_holds_nothing(model: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 60)
    settings = ["--model", str(model), "--output-dir", str(tmp_path / "index"), "--num-workers", "0"]
    assert cli.main(["index", str(tmp_path / "pictures"), *settings]) == 0
    assert soaked("search", tmp_path / "index").faults("search") == []


@pytest.mark.nightly
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["maps", "streams"])
def test_an_hour_of_steps_holds_nothing(kind: str, workers: int, inputs: Inputs, tmp_path: Path) -> None:
    fields: dict[str, Any] = small_runs.stage2_fields(tmp_path / "run", inputs.vision, inputs.text, inputs.cache)
    fields |= {"sources": [small_runs.concepts(max_samples=96)], "eval_sources": {}, "per_device_train_batch_size": 1}
    fields["dataloader_num_workers"] = workers
    if kind == "streams":
        tars = write_tars(tmp_path / "tars")
        embedded(inputs, Path(), source(tars), output_dir="")
        fields |= {"sources": [source(tars)], "embedding_cache": tars, "shuffle_block": 8}
    (tmp_path / "recipe.json").write_text(json.dumps(fields))
    assert soaked("loader", tmp_path / "recipe.json").faults(f"{kind}, {workers} workers") == []


@pytest.mark.nightly
def test_five_hundred_requests_to_a_served_demo_hold_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = write_pictures(tmp_path / "pictures", 5)
    lines = [json.dumps({"file_name": path.name, "caption": CAPTIONS[number]}) for number, path in enumerate(pictures)]
    (tmp_path / "pictures/metadata.jsonl").write_text("\n".join(lines))
    arguments = ("demo", "--model", model, "--data", tmp_path / "pictures", "--split", "train")
    with served("-m", "llm2clip", *arguments, folder=tmp_path) as (address, process):
        page = open_page(address, tmp_path, monkeypatch)
        files = [handle_file(str(path)) for path in pictures]

        def request(number: int) -> Any:
            caption, file = CAPTIONS[number % 7], files[number % 5]
            if number % 5 < 3:
                return page.predict(caption, api_name="/search")
            if number % 5 == 3:
                return page.predict(file, "\n".join(CAPTIONS), "{}", api_name="/classify")
            return page.predict(file, api_name="/search_by_image")

        found = Soak.of(request, 500, 100, process)
    assert found.faults("demo") == []
