"""The bar of training replaces the Trainer's own output."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.builders import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.rows import MapRows, image_rows, stage2


def test_training_is_one_line_on_the_terminal_and_its_values_are_details_of_the_log(
    inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    trainer = stage2(inputs, tmp_path, MapRows(image_rows(tiny.HIDDEN)))
    with caplog.at_level(logging.DEBUG, logger="llm2clip"):
        trainer.train()
        for _ in range(2):
            trainer.log({"eval_test_recall@1": 0.25, "eval_test_mean_rank": 3.0})
    output = capsys.readouterr()
    assert "'loss'" not in output.out + output.err
    ours = [record for record in caplog.records if "steps in" in record.message or "valuation" in record.message]
    shown = [record.message for record in ours if record.levelno == logging.INFO]
    assert ": 3 steps in 00:" in shown[0]
    assert shown[1:] == ["Evaluation at step 3: test R@1 25.0%"]
    details = [record.message for record in caplog.records if record.levelno == logging.DEBUG]
    assert [line for line in details if line.startswith("step 2: loss ")]


def test_a_script_without_logging_sees_the_values_that_transformers_prints(
    inputs: Inputs, tmp_path: Path, capsys: Any
) -> None:
    stage2(inputs, tmp_path, MapRows(image_rows(tiny.HIDDEN))).train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("{'loss': ") for line in lines] == [True, True, True, False]
    assert "train_runtime" in lines[-1]
