"""The moving average of the trained weights: by hand, in evaluation, published, on two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from llm2clip.trainers import weight_average
from llm2clip.trainers.weight_average import AVERAGE_FILE
from llm2clip.utils.embeddings import NonFiniteError
from llm2clip.utils.manifests import damage
from llm2clip.utils.processes import leave_process_group
from tests.llm2clip.trainers.rows import BATCH, averages, in_order, keyed_rows
from tests.llm2clip.trainers.stages import load
from tests.processes import run_ranks

HALF_LIFE = 2.0


def weights(folder: Path) -> dict[str, Tensor]:
    return load(folder).state_dict()


def trained_of(trainer: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that all of the expected weights are the same, bit for bit."""
    assert not [name for name, value in expected.items() if not actual[name].equal(value)]


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "tower_chunk_size": 3}])
def test_the_average_is_that_by_hand_and_becomes_the_model(changes: dict[str, Any], tmp_path: Path) -> None:
    data = keyed_rows(4 * BATCH * changes.get("gradient_accumulation_steps", 1))
    trainer = in_order(tmp_path, data, max_steps=4, ema_half_life=HALF_LIFE, **changes)
    start = expected = trained_of(trainer)
    assert 0 < len(expected) < len(trainer.model.state_dict()), "the LLM is frozen"
    trainer.train()
    decay = 0.5 ** (1 / HALF_LIFE)
    for step in range(1, 5):
        checkpoint = tmp_path / f"checkpoint-{step}"
        current = weights(checkpoint)
        expected = {name: decay * value + (1 - decay) * current[name] for name, value in expected.items()}
        found = averages(checkpoint)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-7, rtol=1e-6)
        assert AVERAGE_FILE in json.loads((checkpoint / ".llm2clip.json").read_text())["files"]
    assert any(not found[name].equal(start[name]) and not found[name].equal(current[name]) for name in found)
    assert_same(trained_of(trainer), found)
    trainer.save_model(str(tmp_path / "result"))
    assert_same(weights(tmp_path / "result"), found)


def test_evaluation_measures_the_average_and_training_does_not_notice(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"evaluated": keyed_rows(2 * BATCH), "eval_strategy": "steps", "eval_steps": 1}
    plain = in_order(tmp_path / "plain", keyed_rows(3 * BATCH), **fields)
    plain.train()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = in_order(tmp_path / "average", keyed_rows(3 * BATCH), ema_half_life=HALF_LIFE, **fields, **best)
    trainer.train()
    measured = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(measured) == 3
    for entry in measured:
        checkpoint = f"checkpoint-{entry['step']}"
        assert_same(weights(tmp_path / "average" / checkpoint), weights(tmp_path / "plain" / checkpoint))
        plain.model.load_state_dict(averages(tmp_path / "average" / checkpoint), strict=False)
        assert entry["eval_loss"] == plain.evaluate()["eval_loss"]
        assert entry["eval_ema_half_life"] == HALF_LIFE
    chosen = trainer.state.best_global_step
    assert chosen < 3
    assert_same(trained_of(trainer), averages(tmp_path / "average" / f"checkpoint-{chosen}"))


def test_weights_come_back_after_an_evaluation_that_fails(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"evaluated": keyed_rows(BATCH, 3), "eval_strategy": "steps", "eval_steps": 2}
    trainer = in_order(tmp_path, keyed_rows(3 * BATCH), ema_half_life=HALF_LIFE, **fields)
    with pytest.raises(NonFiniteError, match="evaluation at step 2"):
        trainer.train()
    plain = in_order(tmp_path / "plain", keyed_rows(3 * BATCH), max_steps=2)
    plain.train()
    assert_same(trained_of(trainer), trained_of(plain))


class Publish(TrainerCallback):
    """Copies each checkpoint for the Hub, as pushing does."""

    trainer: Any

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.trainer.publish(checkpoint)
        assert not Path(args.output_dir, AVERAGE_FILE).exists()
        assert_same(weights(Path(args.output_dir)), averages(checkpoint))
        own = weights(checkpoint)
        assert_same(trained_of(self.trainer), {name: own[name] for name in averages(checkpoint)})


def test_pushed_checkpoints_have_the_average(tmp_path: Path) -> None:
    publish = Publish()
    publish.trainer = in_order(tmp_path, keyed_rows(2 * BATCH), [publish], max_steps=2, ema_half_life=HALF_LIFE)
    publish.trainer.train()
    assert not weights(tmp_path)["logit_scale"].equal(weights(tmp_path / "checkpoint-2")["logit_scale"])


class InfiniteBetweenSteps(TrainerCallback):
    """Gives a weight an infinite value after the second step, and its own again before the third one."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.value = model.visual_projection.weight.data[0, 0].clone()
            model.visual_projection.weight.data[0, 0] = float("inf")

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            model.visual_projection.weight.data[0, 0] = self.value


def test_a_broken_average_is_not_saved(tmp_path: Path) -> None:
    changes = {"ema_half_life": HALF_LIFE, "save_steps": 3}
    trainer = in_order(tmp_path, keyed_rows(3 * BATCH), [InfiniteBetweenSteps()], **changes)
    with pytest.raises(NonFiniteError, match=r"after step 3, averages of weights are .* \(visual_projection\.weight"):
        trainer.train()
    assert damage(tmp_path / "checkpoint-3") is not None


def forget_settings(checkpoint: Path) -> Path:
    """Make a checkpoint one of which nobody knows with which settings and files it was written."""
    for name in ("settings.json", ".llm2clip.json"):
        (checkpoint / name).unlink()
    return checkpoint


def test_a_checkpoint_without_this_average_is_refused(tmp_path: Path) -> None:
    def resume(name: str, checkpoint: Path, **changes: Any) -> Any:
        trainer = in_order(tmp_path / name, keyed_rows(3 * BATCH), ema_half_life=1.0, **changes)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return trainer

    in_order(tmp_path / "plain", keyed_rows(3 * BATCH), max_steps=1).train()
    checkpoint = forget_settings(tmp_path / "plain" / "checkpoint-1")
    with pytest.raises(ValueError, match=r"checkpoint-1 has no ema\.safetensors.*--resume-anyway"):
        resume("a", checkpoint)
    # Begun with the weights of the checkpoint.
    trainer = resume("b", checkpoint, max_steps=2, resume_anyway=True)
    start, end = weights(checkpoint), weights(tmp_path / "b" / "checkpoint-2")
    for name, value in trained_of(trainer).items():
        torch.testing.assert_close(value, (start[name] + end[name]) / 2, atol=1e-7, rtol=1e-6)
    other = {**averages(tmp_path / "b" / "checkpoint-2"), "logit_scale": torch.zeros(2)}
    save_file(other, tmp_path / "b" / "checkpoint-2" / AVERAGE_FILE)
    with pytest.raises(ValueError, match=r"does not contain the averages .* \(logit_scale, \.\.\.\)"):
        resume("c", forget_settings(tmp_path / "b" / "checkpoint-2"))


def test_sharded_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_average, "is_sharded", lambda accelerator: True)
    with pytest.raises(ValueError, match="but FSDP and DeepSpeed give no process the whole weights"):
        in_order(tmp_path, keyed_rows(BATCH), ema_half_life=HALF_LIFE)


def run_in_process(folder: Path, batch: int) -> None:
    """Train on one of several processes, and write down the average of each."""
    changes = {"per_device_train_batch_size": batch, "tower_chunk_size": 3, "gradient_accumulation_steps": 2}
    fields: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "evaluated": keyed_rows(2 * BATCH)}
    trainer = in_order(folder, keyed_rows(80), max_steps=2, ema_half_life=HALF_LIFE, **changes, **fields)
    trainer.train()
    save_file(trained_of(trainer), folder / f"{trainer.args.process_index}.safetensors")


@pytest.mark.slow
def test_two_processes_have_the_average_of_one(tmp_path: Path) -> None:
    for name, processes, batch in [("one", 1, 16), ("two", 2, 8)]:
        (tmp_path / name).mkdir()
        module = ["-m", "tests.llm2clip.trainers.test_weight_average", str(tmp_path / name), str(batch)]
        run_ranks(module, processes)
    first, second = (load_file(tmp_path / "two" / f"{rank}.safetensors") for rank in range(2))
    assert_same(second, first)
    assert_same(averages(tmp_path / "two" / "checkpoint-2"), first)
    for name, value in averages(tmp_path / "one" / "checkpoint-2").items():
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    run_in_process(Path(sys.argv[1]), int(sys.argv[2]))
    leave_process_group()
