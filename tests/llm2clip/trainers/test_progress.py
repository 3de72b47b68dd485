"""The bar of training replaces the Trainer's own output."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from llm2clip.trainers.progress import TrainingProgress
from llm2clip.utils.progress import section


class Line(nn.Module):
    """A model of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": ((self.weight - x) ** 2).mean()}


def make_trainer(folder: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, logging_steps=2, use_cpu=True, report_to="none", save_strategy="no",
        per_device_train_batch_size=1,
    )  # fmt: skip
    rows = [{"x": torch.ones(1)} for _ in range(6)]
    trainer = Trainer(Line(), arguments, train_dataset=rows, callbacks=[TrainingProgress("Stage 1")])  # type: ignore[arg-type]
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    return trainer


def test_training_is_one_line_on_the_terminal_and_its_values_are_details_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, logger="llm2clip"):
        trainer = make_trainer(tmp_path)
        trainer.train()
        for _ in range(2):
            trainer.log({"eval_test_recall@1": 0.25, "eval_test_mean_rank": 3.0})
    output = capsys.readouterr()
    assert "'loss'" not in output.out + output.err
    ours = [record for record in caplog.records if record.name.startswith("llm2clip")]
    shown = [record.message for record in ours if record.levelno == logging.INFO]
    assert shown[0].startswith("Stage 1: 6 steps in 00:00, ")
    assert ", loss 0." in shown[0]
    assert shown[1:] == ["Evaluation at step 6: test R@1 25.0%"]
    details = [record.message for record in ours if record.levelno == logging.DEBUG]
    assert details[0].startswith("step 2: loss ")


def test_a_script_without_logging_sees_the_values_that_transformers_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(tmp_path).train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("{'loss': ") for line in lines] == [True, True, True, False]
    assert "train_runtime" in lines[-1]
    assert "total_flos" not in lines[-1]


def test_evaluations_within_a_step_of_a_command_are_details(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path)
    with caplog.at_level(logging.DEBUG, logger="llm2clip"), section("1/8 A step"):
        trainer.log({"eval_test_recall@1": 0.25})
    (record,) = [record for record in caplog.records if record.message.startswith("Evaluation")]
    assert record.levelno == logging.DEBUG


def test_close_removes_the_bar_after_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    progress = TrainingProgress("Stage 1")
    trainer = make_trainer(tmp_path)
    progress.on_train_begin(trainer.args, trainer.state, trainer.control)
    with caplog.at_level(logging.DEBUG, logger="llm2clip"):
        progress.close()
    assert not caplog.messages
