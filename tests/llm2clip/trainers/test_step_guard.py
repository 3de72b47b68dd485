"""Steps with NaN or infinite values end a run or are skipped, the same on all processes; no checkpoint has them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from llm2clip import LLM2CLIPModel, Stage2Config, Stage2Trainer
from llm2clip.data import SkipLog
from llm2clip.trainers.run_state import SkippedSamples
from llm2clip.trainers.step_guard import describe
from llm2clip.utils.embeddings import NonFiniteError
from llm2clip.utils.processes import leave_process_group
from tests.llm2clip.trainers.test_plain_datasets import MapRows, Rows
from tests.modeling_llm2clip import tiny
from tests.processes import run_ranks

WIDTH = tiny.HIDDEN
BATCH = 8


class InOrder(Stage2Trainer):
    """Takes the rows in order, so that a test knows the step of each; `broken_loss` has rank and step of a NaN."""

    broken_loss: tuple[int, int] | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def loss_and_outputs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, outputs = super().loss_and_outputs(model, inputs)
        if self.broken_loss == (self.args.process_index, self.state.global_step):
            loss = loss + float("nan")  # the gradients stay finite
        return loss, outputs


def rows(count: int, *broken: int, value: float = float("nan")) -> Rows:
    torch.manual_seed(0)
    pixels, embeds = torch.randn(count, 3, 28, 28), torch.randn(count, WIDTH)
    pixels[list(broken), 0, 3, 3] = value
    return [{"key": f"k{i}", "pixel_values": pixels[i], "llm_embeds": embeds[i]} for i in range(count)]


def trainer_of(folder: Path, data: Rows, callbacks: Any = None, evaluated: Rows | None = None, **changes: Any) -> Any:
    shared = {
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "lr_scheduler_type": "constant",
    }
    fields = {"learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 3, "per_device_train_batch_size": BATCH}
    torch.manual_seed(1)
    model = tiny.joint_model()
    if changes.get("loss") == "sigmoid":
        model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    return InOrder(
        model=model,
        args=Stage2Config(**{"output_dir": str(folder), **shared, **fields, **changes}),
        train_dataset=MapRows(data),
        eval_dataset=None if evaluated is None else MapRows(evaluated),
        callbacks=callbacks,
    )


def weights(folder: Path) -> dict[str, Tensor]:
    return LLM2CLIPModel.from_pretrained(folder, text_model=False).state_dict()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def logged(trainer: Any, name: str) -> list[Any]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("changes", [{}, {"tower_chunk_size": 3}, {"loss": "sigmoid"}])
def test_a_broken_sample_ends_the_run_and_no_checkpoint_has_it(
    changes: dict[str, Any], value: float, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, rows(3 * BATCH, BATCH + 2, value=value), **changes)
    with pytest.raises(
        NonFiniteError, match=r"step 2: embeddings are NaN or infinite, those of k10\. Look at"
    ) as caught:
        trainer.fit()
    assert "--skip-bad-steps N" in str(caught.value)
    assert checkpoints(tmp_path) == ["checkpoint-1"]
    assert not (tmp_path / "model.safetensors").exists()
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "checkpoint-1").values())


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "tower_chunk_size": 3}])
def test_bad_steps_are_skipped_and_counted_and_the_next_one_ends_the_run(
    changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step = BATCH * changes.get("gradient_accumulation_steps", 1)
    data = rows(5 * step, step + 2, 3 * step + 1, 4 * step)
    trainer = trainer_of(tmp_path, data, max_steps=5, skip_bad_steps=2, **changes)
    with pytest.raises(NonFiniteError, match=rf"step 5: .* k{4 * step}\. 2 steps were skipped before it"):
        trainer.train()
    assert logged(trainer, "skipped_steps") == [1, 2]
    assert (
        f"step 2: embeddings are NaN or infinite, those of k{step + 2}. The step is skipped, number 1 of 2"
        in caplog.text
    )
    assert checkpoints(tmp_path) == [f"checkpoint-{number}" for number in (1, 2, 3, 4)]
    one, two, three = (weights(tmp_path / f"checkpoint-{number}") for number in (1, 2, 3))
    assert all(one[name].equal(two[name]) for name in one)
    assert any(not two[name].equal(three[name]) for name in one)
    assert all(weight.isfinite().all() for weight in three.values())


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    data = rows(4 * BATCH, BATCH, 2 * BATCH)
    trainer_of(tmp_path, data, max_steps=2, skip_bad_steps=1).train()
    resumed = trainer_of(tmp_path, data, skip_bad_steps=1, resume_anyway=True)
    with pytest.raises(NonFiniteError, match=r"step 3: .* 1 steps were skipped before it"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class Spoil(TrainerCallback):
    """Gives the gradients, or the weights after the optimizer, of a step an infinite value."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.event == "gradients" and state.global_step == self.step - 1:
            weight = model.visual_projection.weight
            handle = weight.register_hook(lambda grad: (handle.remove(), torch.full_like(grad, float("inf")))[1])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.event == "weights" and state.global_step == self.step - 1:
            with torch.no_grad():
                model.visual_projection.weight[0, 0] = float("inf")


def test_broken_gradients_end_the_run_and_can_be_skipped(tmp_path: Path) -> None:
    keys = ", ".join(f"k{BATCH + number}" for number in range(BATCH))
    with pytest.raises(
        NonFiniteError, match=rf"step 2: the gradients are NaN or infinite\. The samples .* are {keys}\."
    ):
        trainer_of(tmp_path / "a", rows(3 * BATCH), [Spoil("gradients", 2)]).train()
    trainer = trainer_of(tmp_path / "b", rows(3 * BATCH), [Spoil("gradients", 2)], skip_bad_steps=1)
    trainer.train()
    assert logged(trainer, "skipped_steps") == [1]
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "b" / "checkpoint-3").values())


def test_a_checkpoint_with_broken_weights_is_not_written(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rows(3 * BATCH), [Spoil("weights", 2)])
    with pytest.raises(
        NonFiniteError, match=r"after step 2, .* infinite \(visual_projection\.weight\), and are not saved"
    ):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-1"]
    result = trainer_of(tmp_path / "end", rows(BATCH), [Spoil("weights", 1)], max_steps=1, save_strategy="no")
    with pytest.raises(NonFiniteError, match="after step 1"):
        result.fit(None)
    assert not (tmp_path / "end" / "model.safetensors").exists()


def test_broken_rows_end_the_evaluation(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rows(BATCH), evaluated=rows(20, 13), per_device_eval_batch_size=5)
    with pytest.raises(NonFiniteError, match="evaluation at step 0: embeddings are NaN or infinite, those of k13"):
        trainer.evaluate()


def test_rows_without_keys_are_named_by_number(tmp_path: Path) -> None:
    data = [{name: value for name, value in row.items() if name != "key"} for row in rows(BATCH, 2)]
    with pytest.raises(NonFiniteError, match="those of row 2 of its batch"):
        trainer_of(tmp_path, data, max_steps=1).train()
    assert describe([{"broken": [], "keys": [], "loss": float("inf")}]) == "the loss is inf"


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="skip_bad_steps must be at least 0, but is -1"):
        Stage2Config(output_dir="x", skip_bad_steps=-1)


class SkipOne(TrainerCallback):
    def __init__(self, skipped: SkippedSamples) -> None:
        self.skipped = skipped

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.skipped.add([("torn", "it is damaged")])


def run_in_process(folder: Path) -> None:
    """Train on one of several processes; the main one writes the log."""
    # Row 20 of a global batch of 16: step 2, row 4 of the first process.
    trainer = trainer_of(folder, rows(64, 20), max_steps=4, skip_bad_steps=2)
    trainer.broken_loss = (1, 2)
    # Both processes have met this row, in different epochs.
    trainer.run_state.skipped.log = SkipLog(folder / f"skipped-{trainer.args.process_index}.jsonl")
    trainer.add_callback(SkipOne(trainer.run_state.skipped))
    trainer.train()
    ranked = {"weights": trainer.model.visual_projection.weight.tolist(), "skipped": trainer.guard.skipped}
    (folder / f"{trainer.args.process_index}.json").write_text(json.dumps(ranked))


@pytest.mark.slow
def test_two_processes_skip_the_same_steps(tmp_path: Path) -> None:
    result = run_ranks(["-m", "tests.llm2clip.trainers.test_step_guard", str(tmp_path)], 2)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert one["skipped"] == 2
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [(entry["step"], entry["skipped_steps"]) for entry in history if "skipped_steps" in entry] == [
        (1, 1),
        (2, 2),
    ]
    assert {entry["skipped_samples"] for entry in history} == {1}, "a row counts once"
    assert re.search(r"step 3: the loss is nan\. The samples of this step are k32, .* k47\.", result.errors)


if __name__ == "__main__":
    run_in_process(Path(sys.argv[1]))
    leave_process_group()
