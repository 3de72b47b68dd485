"""What a run measures of its retrieval sets: before its first step, and to choose its best checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from llm2clip.data import CaptionSource
from llm2clip.evaluation.data import RetrievalData
from llm2clip.files.atomic import read_json
from llm2clip.store import EmbeddingCache
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.rows import BATCH, image_rows, in_order, keyed_rows, logged, stage2
from tests.llm2clip.trainers.stages import (
    GLOSS_TEST,
    assert_equal,
    broken_after,
    history,
    losses,
    metric,
    run,
)

CONCEPTS_TEST = small_runs.concepts("validation", caption_columns=["caption"], max_samples=20)
SETS: dict[str, dict[str, Any]] = {
    "stage1": {"glosses": GLOSS_TEST},
    "stage2": {"one": CONCEPTS_TEST, "two": {**CONCEPTS_TEST, "max_samples": 10}},
    "distill": {"concepts": CONCEPTS_TEST},
}


def mean_recall(entry: dict[str, Any]) -> float:
    return fmean(value for name, value in entry.items() if re.fullmatch(r"eval_.*recall@(1|5|10)", name))


@pytest.mark.parametrize("stage", SETS)
def test_the_best_checkpoint_is_that_of_the_highest_mean_recall(stage: str, inputs: Inputs, tmp_path: Path) -> None:
    changes = {"eval_sources": SETS[stage], "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    run(stage, tmp_path, inputs, load_best_model_at_end=True, **changes)
    evaluated = [entry for entry in history(tmp_path) if "eval_mean_recall" in entry]
    assert [entry["eval_mean_recall"] for entry in evaluated] == [pytest.approx(mean_recall(x)) for x in evaluated]
    state = read_json(tmp_path / "trainer_state.json")
    of_steps = {entry["step"]: entry["eval_mean_recall"] for entry in evaluated[1:4]}
    assert [*of_steps] == [1, 2, 3]
    assert state["best_metric"] == max(of_steps.values()) == of_steps[state["best_global_step"]]


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_by_a_metric_follows_the_mean_recall_or_the_loss_of_rows(
    schedule: str, inputs: Inputs, tmp_path: Path
) -> None:
    steps = {"lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}
    run("stage1", tmp_path / "run", inputs, eval_sources=SETS["stage1"], max_steps=2, **steps)
    assert metric(tmp_path / "run", "eval_mean_recall") >= 0
    trainer = in_order(tmp_path / "rows", keyed_rows(BATCH * 3), evaluated=keyed_rows(BATCH), **steps)
    trainer.train()
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("loss", False)


@pytest.mark.parametrize("stage", SETS)
def test_recalls_before_the_training_are_in_the_result_also_of_a_resumed_run_and_change_nothing(
    stage: str, inputs: Inputs, tmp_path: Path
) -> None:
    unbroken, plain = tmp_path / "unbroken", tmp_path / "plain"
    found = run(stage, unbroken, inputs, eval_sources=SETS[stage])
    run(stage, plain, inputs, eval_sources={})
    assert losses(unbroken) == losses(plain)
    assert_equal(unbroken, plain)
    first, last = (entry for entry in history(unbroken) if "eval_mean_recall" in entry)
    assert first["step"] == 0
    before = {name.replace("before_training", "eval"): x for name, x in found.items() if "before_training" in name}
    recalls = {name for name in found if re.fullmatch(r"eval_.*_recall@\d+", name)}
    assert before == {name: first[name] for name in recalls}
    assert {name: found[name] for name in recalls} == {name: last[name] for name in recalls}
    broken = broken_after(unbroken, tmp_path / "broken", 3)
    resumed = run(stage, broken, inputs, resume=True, eval_sources=SETS[stage])
    assert {name: x for name, x in resumed.items() if "recall@" in name} == {
        name: x for name, x in found.items() if "recall@" in name
    }


def test_measuring_before_the_training_leaves_the_order_of_plain_rows(inputs: Inputs, tmp_path: Path) -> None:
    """The samplers of transformers draw their seed from torch's own random numbers."""
    rows = image_rows(32)
    sets = {"one": RetrievalData.from_source(CaptionSource.from_dict(CONCEPTS_TEST))}
    found = []
    for retrieval in ({}, sets):
        trainer = stage2(inputs, tmp_path / str(len(retrieval)), rows)
        trainer.retrieval, trainer.embed = retrieval, EmbeddingCache.open(inputs.cache).lookup
        trainer.train()
        found.append(logged(trainer, "loss"))
    assert found[0] == found[1]
