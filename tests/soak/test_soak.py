"""The same call again and again: memory, open files, threads and tensors stay what they are."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip import cli
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.test_stage2_captions import embedded, source, write_tars
from tests.modeling_llm2clip import tiny as tiny_models
from tests.processes import run_python
from tests.soak.measure import Level, Soak

pytestmark = pytest.mark.slow


def soaked(name: str, *arguments: Path | str) -> Soak:
    """Run a program in a process of its own, so that nothing else is measured."""
    command = ["-m", "tests.soak.programs", name, *map(str, arguments)]
    output = run_python(command, PYTHONPATH=os.pathsep.join(sys.path)).stdout
    return Soak.from_json(json.loads(output.splitlines()[-1]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("soak") / "model"
    tiny_models.save(folder)
    return folder


@pytest.mark.parametrize("name", ["encode_text", pytest.param("encode_image", marks=pytest.mark.nightly)])
def test_embedding_holds_nothing(name: str, model: Path) -> None:
    found = soaked(name, model)
    print(found.report(name))
    assert found.faults() == []


@pytest.mark.nightly
def test_an_open_index_holds_nothing(model: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(60):
        tiny_models.IMAGES[number % 2].rotate(6 * number, expand=True).save(pictures / f"{number}.png")
    settings = ["--model", str(model), "--output-dir", str(tmp_path / "index"), "--num-workers", "0"]
    assert cli.main(["index", str(pictures), *settings]) == 0
    found = soaked("search", tmp_path / "index")
    print(found.report("search"))
    assert found.faults() == []


@pytest.mark.nightly
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["maps", "streams"])
def test_an_hour_of_steps_holds_nothing(kind: str, workers: int, inputs: Inputs, tmp_path: Path) -> None:
    fields: dict[str, Any] = tiny.stage2_fields(tmp_path / "run", inputs.vision, inputs.text, inputs.cache)
    fields |= {"sources": [tiny.concepts(max_samples=96)], "eval_sources": {}, "per_device_train_batch_size": 1}
    fields["dataloader_num_workers"] = workers
    if kind == "streams":
        tars = write_tars(tmp_path / "tars")
        embedded(inputs, Path(), source(tars), output_dir="")
        fields |= {"sources": [source(tars)], "embedding_cache": tars, "shuffle_block": 8}
    (tmp_path / "recipe.json").write_text(json.dumps(fields))
    found = soaked("loader", tmp_path / "recipe.json")
    print(found.report(f"{kind}, {workers} workers"))
    assert found.faults() == []


def test_a_tensor_that_is_kept_per_call_is_found(model: Path) -> None:
    [fault] = soaked("leaking", model).faults()
    assert fault.startswith("tensors grew by")


def test_memory_files_and_threads_that_are_kept_are_found() -> None:
    def levels(**steps: int) -> list[Level]:
        base = {"memory": 600 * 2**20, "handles": 30, "threads": 4}
        return [
            Level(**{key: value + number * steps.get(key, 0) for key, value in base.items()}) for number in range(21)
        ]

    assert Soak(2000, levels()).faults() == []
    assert Soak(2000, levels(memory=2**19)).faults() == []  # 1.3%
    for name, step in (("memory", 2**20), ("handles", 1), ("threads", 1)):
        [fault] = Soak(2000, levels(**{name: step})).faults()
        assert fault.startswith(f"{name} grew by")
