"""The way from `train()` to the loss: one name, few frames, and the same for a loss of the caller's."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

import llm2clip
from llm2clip.trainers import stage1_trainer, stage2_trainer
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.rows import stage1, stage2

# By the stage: its Trainer, and where it finds the loss.
LOSSES: dict[str, Any] = {
    "stage1": (stage1, stage1_trainer, "hard_negative_info_nce"),
    "stage2": (stage2, stage2_trainer, "clip_loss"),
}


class InTheLossError(Exception):
    """Raised inside a loss, to read the way to it."""


def raise_in_loss(*_: Any, **__: Any) -> Any:
    raise InTheLossError


@pytest.mark.parametrize("stage", LOSSES)
def test_three_frames_of_ours_lead_from_train_to_the_loss(
    stage: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, module, loss = LOSSES[stage]
    trainer = make(inputs, tmp_path, max_steps=1)
    monkeypatch.setattr(module, loss, raise_in_loss)
    with pytest.raises(InTheLossError) as raised:
        trainer.train()
    package = str(Path(llm2clip.__file__).parent)
    frames = [frame.name for frame in traceback.extract_tb(raised.tb) if frame.filename.startswith(package)]
    assert frames == ["train", "compute_loss", "contrastive_loss"]
