"""Rows and shards that the ranks do not divide: the result of one rank, or up front one error of all ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.builders import small_runs
from tests.faults.content import content, differences
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import embedded, source, write_tars
from tests.processes import run_python
from tests.processes.jobs import Jobs

pytestmark = pytest.mark.slow

# Rows: fewer than ranks, and a number that 2 and 4 do not divide.
ROWS = {"few": 1, "odd": 11}
TOO_FEW = {
    "stage1": "fill no batch of",
    "mntp": "do not fill one block of 32",
    "stage2": "fewer than one global batch",
    "features": "fewer rows than one batch of",
    "parts": "fewer rows than one batch of",
    "first-rows": "has 1 rows, fewer than",
}
TRAINED = ("stage1-odd", "mntp-odd", "stage2-odd", "features-odd", "parts-odd", "few-eval-rows", "one-shard")
# What the stages measure of their own speed.
TIMES = ("runtime", "per_second")


def cases(jobs: Jobs, inputs: Inputs, tar: str, folder: Path) -> dict[str, Any]:
    """Return the commands and settings of all cases; each writes into a folder of its name."""
    few = {"save_strategy": "no", "eval_sources": {}, "per_device_train_batch_size": 1, "max_steps": 2}
    stage1 = {**small_runs.stage1_fields(folder, inputs.llm), **few, "per_device_train_batch_size": 2}
    stage2 = {**small_runs.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache), **few}
    embed = {"text_model_name_or_path": inputs.text, "shard_size": 3}
    found: dict[str, Any] = {}
    for name, rows in ROWS.items():
        glosses, concepts = (
            {"path": small_runs.GLOSSES, "max_samples": rows},
            {"sources": [small_runs.concepts(max_samples=rows)]},
        )
        pairs = {"sources": [{**glosses, "anchor_column": "lemmas", "positive_column": "gloss"}]}
        texts = {"sources": [{**glosses, "caption_columns": ["gloss"]}], "block_size": 32}
        images = small_runs.concepts("validation", caption_columns=["caption"], max_samples=rows)
        parts = {"parts": [{"freeze_vision": "all"}, {"freeze_vision_layers": 1}]}
        found |= {
            f"stage1-{name}": ("stage1", stage1 | pairs),
            f"mntp-{name}": ("mntp", stage1 | texts),
            f"stage2-{name}": ("stage2", stage2 | concepts),
            f"features-{name}": ("stage2", stage2 | concepts | {"freeze_vision": "all"}),
            f"parts-{name}": ("stage2", stage2 | concepts | parts),
            f"cache-{name}": ("embed", embed | concepts),
            f"evaluate-{name}": ("evaluate", {"model": str(jobs.folder / "model"), "data": images}),
        }
    one_image = {"validation": small_runs.concepts("validation", caption_columns=["caption"], max_samples=1)}
    stream = stage2 | {"sources": [source(tar)], "embedding_cache": tar, "shuffle_block": 8}
    first_rows = {"sources": [source(tar, max_samples=1)], "embedding_cache": inputs.cache}
    found |= {
        "few-eval-rows": ("stage2", stage2 | concepts | {"eval_sources": one_image}),
        "one-shard": ("stage2", stream),
        "first-rows-few": ("stage2", stream | first_rows),
        "sidecars-few": ("embed", {"text_model_name_or_path": inputs.text, "sources": [source(tar)]}),
    }
    return {
        name: (command, fields if command == "evaluate" else fields | {"output_dir": str(folder / name)})
        for name, (command, fields) in found.items()
    }


def run_cases(folder: Path, found: dict[str, Any], ranks: int, jobs: Jobs) -> list[dict[str, Any]]:
    """Return what each rank sees of each case."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(found))
    run_python(["-m", "tests.processes.uneven", str(folder)], ranks, folder=folder, seconds=200, **jobs.environment)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_uneven_data_gives_the_result_of_one_rank_or_one_error_up_front(
    ranks: int, jobs: Jobs, inputs: Inputs, tmp_path: Path
) -> None:
    tar = write_tars(tmp_path / "tar", 1)
    embedded(inputs, Path(), source(tar), output_dir="")
    first, *others = run_cases(tmp_path / "several", cases(jobs, inputs, tar, tmp_path / "of-several"), ranks, jobs)
    of_one = {
        name: case
        for name, case in cases(jobs, inputs, tar, tmp_path / "of-one").items()
        if case[0] in ("embed", "evaluate")
    }
    [one] = run_cases(tmp_path / "one", of_one, 1, jobs)
    assert set(first) == {*of_one, *TRAINED, *(f"{name}-few" for name in TOO_FEW)}
    assert [_timeless(other) for other in others] == [_timeless(first)] * (ranks - 1)
    for name, message in TOO_FEW.items():
        assert message in str(first[f"{name}-few"])
        assert not (tmp_path / "of-several" / f"{name}-few" / "model.safetensors").exists()
    for name in TRAINED:
        assert isinstance(first[name], dict), first[name]
        assert math.isfinite(first[name]["train_loss"]), name
    for name in of_one:
        assert isinstance(first[name], dict), first[name]
        assert first[name] == pytest.approx(one[name]), name
        made, expected = (content(tmp_path / folder / name) for folder in ("of-several", "of-one"))
        assert differences(made, expected) == [], name


def _timeless(results: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {key: value for key, value in result.items() if not key.endswith(TIMES)}
        if isinstance(result, dict)
        else result
        for name, result in results.items()
    }
