"""The card of a run: the revisions of its evaluation data are read beside the training."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llm2clip import Stage2Trainer
from llm2clip.data.table_identity import data_revision
from llm2clip.trainers import model_card
from llm2clip.trainers.stage2_config import Stage2Recipe
from tests.llm2clip.trainers.test_plain_datasets import MapRows
from tests.modeling_llm2clip import tiny


class Signal(TrainerCallback):
    def __init__(self, trained: threading.Event) -> None:
        self.trained = trained

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trained.set()


def test_training_does_not_wait_for_the_checksums_of_evaluation_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trained = threading.Event()

    def slow(source: Any) -> str | None:
        assert trained.wait(60)
        if source["path"] == "gone":
            raise PermissionError("no")
        return data_revision(source)

    monkeypatch.setattr(model_card, "data_revision", slow)
    (tmp_path / "data.csv").write_text("caption\na dog\n")
    sources = {"csv": {"path": str(tmp_path / "data.csv")}, "gone": {"path": "gone"}}
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 28, 28), "llm_embeds": torch.randn(tiny.HIDDEN)} for _ in range(4)]
    fields = {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    args = Stage2Recipe(output_dir=str(tmp_path / "out"), eval_sources=sources, use_cpu=True, **fields)
    trainer = Stage2Trainer(model=tiny.joint_model(), args=args, train_dataset=MapRows(rows))
    trainer.add_callback(Signal(trained))
    trainer.fit()
    revisions: Any = trainer._revisions
    assert revisions.get("csv") == data_revision(sources["csv"])
    assert revisions.get("gone") is None
    assert "the revision of gone is unknown: no" in caplog.text
