"""Every stage on every kind of data goes on after every kind of break as if there had been none."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm2clip import DistillTrainer, MNTPTrainer, Stage1Trainer, Stage2Trainer
from llm2clip.models.embeddings import NonFiniteError
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import assert_equal, at_step, history, interrupt, losses, run, send, steps

STEPS: dict[str, Any] = {"max_steps": 5, "save_steps": 3, "logging_steps": 1}
# By stage and data; runs draw random numbers where they can, and captions are cut.
RUNS: dict[str, dict[str, Any]] = {
    "mntp-blocks": {"lora_dropout": 0.1},
    "stage1-pairs": {"lora_dropout": 0.1, "max_text_length": 20},
    "stage2-table": {"patch_dropout": 0.25},
    "stage2-stream": {"sources": [small_runs.concepts(streaming=True)], "shuffle_block": 16},
    "stage2-features": {"freeze_vision": "all", "feature_views": 2, "feature_dropout": 0.2},
    "distill-texts": {},
}
TRAINERS: dict[str, Any] = {
    "mntp": MNTPTrainer, "stage1": Stage1Trainer, "stage2": Stage2Trainer, "distill": DistillTrainer,
}  # fmt: skip


@dataclass
class Unbroken:
    """A run that nothing has broken, and how to run the same in another folder."""

    stage: str
    folder: Path
    again: Callable[..., Any]


@pytest.fixture(scope="module")
def unbroken(request: pytest.FixtureRequest, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    stage = request.param.partition("-")[0]
    folder = tmp_path_factory.mktemp(request.param) / "unbroken"

    def again(folder: Path, resume: bool = False) -> Any:
        return run(stage, folder, inputs, resume, **STEPS, **RUNS[request.param])

    again(folder)
    return Unbroken(stage, folder, again)


def by_sigterm(unbroken: Unbroken, folder: Path, patch: pytest.MonkeyPatch) -> None:
    # The second signal, of somebody who does not want to wait, changes nothing.
    at_step(2, lambda: [send(signal.SIGTERM)(), send(signal.SIGTERM)()], patch)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        unbroken.again(folder)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert steps(folder) == [2]


def by_ctrl_c(unbroken: Unbroken, folder: Path, patch: pytest.MonkeyPatch) -> None:
    at_step(5, interrupt, patch)
    with pytest.raises(KeyboardInterrupt):
        unbroken.again(folder)
    assert steps(folder) == [3]


def by_nan(unbroken: Unbroken, folder: Path, patch: pytest.MonkeyPatch) -> None:
    trainer = TRAINERS[unbroken.stage]
    whole = trainer.contrastive_loss

    def broken(self: Any, *batch: Any) -> Any:
        return whole(self, *batch) * (float("nan") if self.state.global_step == 3 else 1)

    patch.setattr(trainer, "contrastive_loss", broken)
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is nan\. The samples of this step are \S+"):
        unbroken.again(folder)
    assert steps(folder) == [3]


def by_kill(unbroken: Unbroken, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """While the last checkpoint was written."""
    shutil.copytree(unbroken.folder, folder)
    for path in (*folder.glob("*.safetensors"), *(folder / "checkpoint-5").glob(".*"), folder / ".llm2clip.json"):
        path.unlink()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"half")


BREAKS = (by_sigterm, by_ctrl_c, by_nan, by_kill)
# Each run has one break that is always tested.
CASES = [
    pytest.param(name, break_run, marks=[pytest.mark.slow] * ((number + place) % len(BREAKS) > 0))
    for number, name in enumerate(RUNS)
    for place, break_run in enumerate(BREAKS)
]


@pytest.mark.parametrize(("unbroken", "break_run"), CASES, indirect=["unbroken"])
def test_a_run_goes_on_after_a_break_as_if_there_had_been_none(
    unbroken: Unbroken, break_run: Callable[..., None], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    with pytest.MonkeyPatch.context() as patch:
        break_run(unbroken, broken, patch)
    assert not (broken / "model.safetensors").exists()
    unbroken.again(broken, resume=True)
    assert_equal(unbroken.folder, broken)
    assert_equal(unbroken.folder / "checkpoint-5", broken / "checkpoint-5")
    assert losses(broken) == losses(unbroken.folder)
    counted = [[entry.get("cut_captions") for entry in history(folder)][-1] for folder in (unbroken.folder, broken)]
    assert counted[0] == counted[1]
    assert bool(counted[0]) == (unbroken.stage == "stage1")
