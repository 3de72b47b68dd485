"""The moving average of the trained weights: by hand, in evaluation, resumed, on two processes."""

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

from llm2clip import Stage2Config
from llm2clip.trainers import base_trainer, run_stage1
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.weight_average import AVERAGE_FILE
from llm2clip.utils.embeddings import NonFiniteError
from llm2clip.utils.manifests import damage
from llm2clip.utils.processes import leave_process_group
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPTextModel
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.test_step_guard import BATCH, rows, trainer_of, weights
from tests.processes import run_ranks

HALF_LIFE = 2.0


def averages(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / AVERAGE_FILE)


def trained_of(trainer: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that all of the expected weights are the same, bit for bit."""
    assert not [name for name, value in expected.items() if not actual[name].equal(value)]


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "tower_chunk_size": 3}])
def test_average_is_that_by_hand_and_becomes_the_model(changes: dict[str, Any], tmp_path: Path) -> None:
    data = rows(4 * BATCH * changes.get("gradient_accumulation_steps", 1))
    trainer = trainer_of(tmp_path, data, max_steps=4, ema_half_life=HALF_LIFE, **changes)
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
    data, seen = rows(3 * BATCH), rows(2 * BATCH)
    fields: dict[str, Any] = {"evaluated": seen, "eval_strategy": "steps", "eval_steps": 1}
    plain = trainer_of(tmp_path / "plain", data, **fields)
    plain.train()
    trainer = trainer_of(tmp_path / "average", data, ema_half_life=HALF_LIFE, **fields)
    trainer.train()
    measured = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    for entry in measured:
        checkpoint = f"checkpoint-{entry['step']}"
        assert_same(weights(tmp_path / "average" / checkpoint), weights(tmp_path / "plain" / checkpoint))
        plain.model.load_state_dict(averages(tmp_path / "average" / checkpoint), strict=False)
        assert entry["eval_loss"] == plain.evaluate()["eval_loss"]
        assert entry["eval_ema_half_life"] == HALF_LIFE
    assert len(measured) == 3
    assert trainer.evaluate()["eval_loss"] == measured[-1]["eval_loss"], "the result is the average"
    assert not any("eval_ema_half_life" in entry for entry in plain.state.log_history)


def test_weights_come_back_after_an_evaluation_that_fails(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"evaluated": rows(BATCH, 3), "eval_strategy": "steps", "eval_steps": 2, "save_steps": 1}
    trainer = trainer_of(tmp_path, rows(3 * BATCH), ema_half_life=HALF_LIFE, **fields)
    with pytest.raises(NonFiniteError, match="evaluation at step 2"):
        trainer.train()
    before = trained_of(trainer)
    trainer_of(tmp_path / "plain", rows(3 * BATCH), max_steps=2, lr_scheduler_type="constant").train()
    assert_same(before, {name: weights(tmp_path / "plain" / "checkpoint-2")[name] for name in before})


def test_resumed_run_has_the_average_of_an_uninterrupted_one(tmp_path: Path) -> None:
    data = rows(6 * BATCH)
    unbroken = trainer_of(tmp_path / "unbroken", data, max_steps=6, ema_half_life=HALF_LIFE)
    unbroken.train()
    resumed = trainer_of(tmp_path / "resumed", data, max_steps=6, ema_half_life=HALF_LIFE)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3"))
    assert_same(trained_of(resumed), trained_of(unbroken))
    for folder in (averages, weights):
        one, two = (folder(tmp_path / name / "checkpoint-6") for name in ("unbroken", "resumed"))
        assert_same(two, one)


def test_resumed_stage1_saves_the_average_of_its_adapter(inputs: Inputs, tmp_path: Path) -> None:
    def run(name: str, resume: bool = False, **changes: Any) -> dict[str, Tensor]:
        fields = tiny.stage1_fields(tmp_path / name, inputs.llm) | {"ema_half_life": HALF_LIFE, **changes}
        run_stage1.run(build_config(Stage1Recipe, fields), resume=resume)
        return LLM2CLIPTextModel.from_pretrained(tmp_path / name).state_dict()

    unbroken = run("unbroken")
    run("broken")
    (tmp_path / "broken" / "checkpoint-6" / AVERAGE_FILE).unlink()
    assert damage(tmp_path / "broken" / "checkpoint-6") == f"{AVERAGE_FILE} is missing"
    assert_same(run("broken", resume=True), unbroken)
    names = averages(tmp_path / "unbroken" / "checkpoint-6").keys()
    assert names
    assert all("lora_" in name for name in names)
    plain = run("plain", ema_half_life=None)
    assert any(not plain[name].equal(value) for name, value in unbroken.items())
    with pytest.raises(ValueError, match=r"other settings \(ema_half_life: null -> 2\.0\)"):
        run("plain", resume=True)


def test_best_checkpoint_gives_its_average(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"evaluated": rows(2 * BATCH), "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_of(tmp_path, rows(3 * BATCH), ema_half_life=HALF_LIFE, learning_rate=1e-2, **fields, **best)
    trainer.train()
    state = trainer.state
    losses = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    assert state.best_global_step == max(losses, key=losses.__getitem__) < 3
    assert_same(trained_of(trainer), averages(tmp_path / f"checkpoint-{state.best_global_step}"))


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
    publish.trainer = trainer_of(tmp_path, rows(2 * BATCH), [publish], max_steps=2, ema_half_life=HALF_LIFE)
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
    trainer = trainer_of(tmp_path, rows(3 * BATCH), [InfiniteBetweenSteps()], **changes)
    with pytest.raises(
        NonFiniteError, match=r"after step 3, averages of weights are .* \(visual_projection\.weight\), and are not"
    ):
        trainer.train()
    assert damage(tmp_path / "checkpoint-3") is not None


def forget_settings(checkpoint: Path) -> None:
    """Make a checkpoint one of which nobody knows with which settings and files it was written."""
    for name in ("settings.json", ".llm2clip.json"):
        (checkpoint / name).unlink()


def test_a_checkpoint_without_this_average_is_refused(tmp_path: Path) -> None:
    data = rows(3 * BATCH)
    trainer_of(tmp_path / "plain", data, max_steps=1).train()
    checkpoint = tmp_path / "plain" / "checkpoint-1"
    with pytest.raises(ValueError, match=r"other settings .*ema_half_life: null -> 1\.0.*--resume-anyway"):
        trainer_of(tmp_path / "a", data, ema_half_life=1.0).train(resume_from_checkpoint=str(checkpoint))
    forget_settings(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint-1 has no ema\.safetensors.*--resume-anyway"):
        trainer_of(tmp_path / "a", data, ema_half_life=1.0).train(resume_from_checkpoint=str(checkpoint))
    # Begun with the weights of the checkpoint.
    trainer = trainer_of(tmp_path / "b", data, max_steps=2, ema_half_life=1.0, resume_anyway=True)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    start, end = weights(checkpoint), weights(tmp_path / "b" / "checkpoint-2")
    for name, value in trained_of(trainer).items():
        torch.testing.assert_close(value, (start[name] + end[name]) / 2, atol=1e-7, rtol=1e-6)
    other = averages(tmp_path / "b" / "checkpoint-2")
    other["logit_scale"] = torch.zeros(2)
    save_file(other, tmp_path / "b" / "checkpoint-2" / AVERAGE_FILE)
    forget_settings(tmp_path / "b" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"does not contain the averages .* \(logit_scale, \.\.\.\)"):
        trainer_of(tmp_path / "c", data, ema_half_life=1.0).train(
            resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2")
        )


def test_sharded_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_trainer, "is_sharded", lambda accelerator: True)
    with pytest.raises(ValueError, match=r"ema_half_life does not work with FSDP or DeepSpeed.*train with DDP"):
        trainer_of(tmp_path, rows(BATCH), ema_half_life=HALF_LIFE)


@pytest.mark.parametrize("half_life", [0, -1.0, float("inf")])
def test_half_life_must_be_a_number_above_zero(half_life: float) -> None:
    with pytest.raises(
        ValueError, match=r"ema_half_life (must be a number of steps above 0|is inf, but it has to be a finite number)"
    ):
        Stage2Config(output_dir="x", ema_half_life=half_life)


def run_in_process(folder: Path, batch: int) -> None:
    """Train on one of several processes, and write down the average of each."""
    changes = {"per_device_train_batch_size": batch, "tower_chunk_size": 3, "gradient_accumulation_steps": 2}
    fields: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "evaluated": rows(2 * BATCH)}
    trainer = trainer_of(folder, rows(80), max_steps=2, ema_half_life=HALF_LIFE, **changes, **fields)
    trainer.train()
    save_file(trained_of(trainer), folder / f"{trainer.args.process_index}.safetensors")


@pytest.mark.slow
def test_two_processes_have_the_average_of_one(tmp_path: Path) -> None:
    module = ["-m", "tests.llm2clip.trainers.test_weight_average"]
    for name, processes, batch in [("one", 1, 16), ("two", 2, 8)]:
        (tmp_path / name).mkdir()
        run_ranks([*module, str(tmp_path / name), str(batch)], processes)
    first, second = (load_file(tmp_path / "two" / f"{rank}.safetensors") for rank in range(2))
    assert_same(second, first)
    assert_same(averages(tmp_path / "two" / "checkpoint-2"), first)
    for name, value in averages(tmp_path / "one" / "checkpoint-2").items():
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    run_in_process(Path(sys.argv[1]), int(sys.argv[2]))
    leave_process_group()
