"""A step with NaN or infinite values ends a run, on all processes alike; no checkpoint has them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llm2clip.command_line.processes import leave_process_group
from llm2clip.models.embeddings import NonFiniteError
from llm2clip.trainers.run_state import RunState
from tests.llm2clip.trainers.rows import BATCH, in_order, keyed_rows, logged
from tests.llm2clip.trainers.stages import history, steps, weights
from tests.processes import run_ranks

INFINITE = float("inf")


def is_finite(checkpoint: Path) -> bool:
    return all(weight.isfinite().all() for weight in weights(checkpoint).values())


@pytest.mark.parametrize(
    ("changes", "value"), [({}, float("nan")), ({"tower_chunk_size": 3}, INFINITE), ({"loss": "sigmoid"}, INFINITE)]
)
def test_a_broken_sample_ends_the_run_and_no_checkpoint_has_it(
    changes: dict[str, Any], value: float, tmp_path: Path
) -> None:
    trainer = in_order(tmp_path, keyed_rows(3 * BATCH, BATCH + 2, value=value), **changes)
    with pytest.raises(NonFiniteError, match=r"step 2: embeddings are .*, those of k10\. Look at these samples"):
        trainer.train()
    assert steps(tmp_path) == [1]
    assert not (tmp_path / "model.safetensors").exists()
    assert is_finite(tmp_path / "checkpoint-1")


def test_a_broken_sample_of_an_accumulated_batch_is_named(tmp_path: Path) -> None:
    changes = {"gradient_accumulation_steps": 2, "tower_chunk_size": 3}
    trainer = in_order(tmp_path, keyed_rows(4 * BATCH, 2 * BATCH + 1), **changes)
    with pytest.raises(NonFiniteError, match=r"step 2: .*, those of k17\."):
        trainer.train()
    assert steps(tmp_path) == [1]


class Spoil(TrainerCallback):
    """Gives the gradients, or the weights after the optimizer, of a step an infinite value."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.event == "gradients" and state.global_step == self.step - 1:
            weight = model.visual_projection.weight
            handle = weight.register_hook(lambda grad: (handle.remove(), torch.full_like(grad, INFINITE))[1])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.event == "weights" and state.global_step == self.step - 1:
            with torch.no_grad():
                model.visual_projection.weight[0, 0] = INFINITE


def test_broken_gradients_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 2: the gradients are .* are k8, k9, .*, k15\."):
        in_order(tmp_path, keyed_rows(3 * BATCH), [Spoil("gradients", 2)]).train()


def test_broken_weights_are_saved_neither_as_a_checkpoint_nor_as_a_result(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"after step 2, .* infinite \(visual_projection\.weight\)"):
        in_order(tmp_path, keyed_rows(3 * BATCH), [Spoil("weights", 2)]).train()
    assert steps(tmp_path) == [1]
    changes = {"max_steps": 1, "save_strategy": "no"}
    trainer = in_order(tmp_path / "end", keyed_rows(BATCH), [Spoil("weights", 1)], **changes)
    trainer.train()
    with pytest.raises(NonFiniteError, match="after step 1"):
        trainer.save_model()
    assert not (tmp_path / "end" / "model.safetensors").exists()


def test_broken_rows_end_the_evaluation_and_are_named_by_number_without_keys(tmp_path: Path) -> None:
    trainer = in_order(tmp_path, keyed_rows(BATCH), evaluated=keyed_rows(20, 13), per_device_eval_batch_size=5)
    with pytest.raises(NonFiniteError, match=r"evaluation at step 0: embeddings are .*, those of k13"):
        trainer.evaluate()
    data = [{name: value for name, value in row.items() if name != "key"} for row in keyed_rows(BATCH, 2)]
    with pytest.raises(NonFiniteError, match="those of row 2 of its batch"):
        in_order(tmp_path, data, max_steps=1).train()


def test_samples_that_a_collator_skips_are_counted_once_and_listed(tmp_path: Path) -> None:
    trainer = in_order(tmp_path, keyed_rows(2 * BATCH), max_steps=2)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {**collate(rows), "skipped": [("torn", "it is damaged")]}
    trainer.train()
    assert set(logged(trainer, "skipped_samples")) == {1}
    assert len((tmp_path / "skipped-0.jsonl").read_text().splitlines()) == 1


class SkipOne(TrainerCallback):
    def __init__(self, run_state: RunState) -> None:
        self.run_state = run_state

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.run_state.count_batch([("torn", "it is damaged")], 0)


def run_in_process(folder: Path) -> None:
    """Train on one of several processes, of which the second has a broken loss in step 3."""
    trainer = in_order(folder, keyed_rows(64), max_steps=4)
    trainer.broken_loss = (1, 2)
    # Both processes have met this row, in different epochs.
    trainer.add_callback(SkipOne(trainer.run_state))
    with pytest.raises(NonFiniteError) as raised:
        trainer.train()
    (folder / f"{trainer.args.process_index}.txt").write_text(str(raised.value))


@pytest.mark.slow
def test_two_processes_end_at_the_same_step_with_the_samples_of_both(tmp_path: Path) -> None:
    run_ranks(["-m", "tests.llm2clip.trainers.test_step_guard", str(tmp_path)], 2)
    one, two = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert one == two
    assert re.match(r"step 3: the loss is nan\. The samples of this step are k32, .* k47\.", one)
    entries = history(tmp_path / "checkpoint-2")
    assert {entry["skipped_samples"] for entry in entries} == {1}, "a row counts once"


if __name__ == "__main__":
    run_in_process(Path(sys.argv[1]))
    leave_process_group()
