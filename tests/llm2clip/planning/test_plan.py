"""The plan of a recipe: from configs alone, in the numbers of its batch, for each way of sharding."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig, PretrainedConfig

from llm2clip import cli
from llm2clip.planning.plan import stage_of
from llm2clip.recipes import find_recipe, load_recipe
from modeling_llm2clip import LLM2CLIPTextConfig
from tests.builders import tiny

LLAMA = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


class Plan:
    """Plans of small models, of which there are only configs."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tiny.decoder_config().save_pretrained(folder / "llm")
        tiny.vision_config().save_pretrained(folder / "vision")
        text = LLM2CLIPTextConfig(decoder_config=LlamaConfig(**LLAMA, **HEADS), max_text_length=32)
        text.save_pretrained(folder / "text")
        texts = ("--text_model_name_or_path", str(folder / "text"))
        llm = ("--model_name_or_path", str(folder / "llm"))
        self.capsys = capsys
        self.arguments = {
            "stage1_paper": (*llm, "--dtype", "float32", "--longest", "24"),
            "stage2_paper": ("--vision_model_name_or_path", str(folder / "vision"), *texts),
            "embed_paper": texts,
            "mntp": (*llm, "--block_size", "32", "--lora_rank", "4"),
        }

    def command(self, recipe: str, *arguments: str) -> tuple[int, str, str]:
        """The exit code, and what is printed on stdout and on stderr."""
        code = cli.main(["plan", recipe, *self.arguments[recipe], *arguments])
        return code, *self.capsys.readouterr()

    def __call__(self, recipe: str, *arguments: str) -> dict[str, Any]:
        code, shown, _ = self.command(recipe, *arguments, "--json")
        assert code == 0
        return json.loads(shown)

    def activations(self, recipe: str, *arguments: str) -> float:
        return self(recipe, *arguments)["strategies"]["DDP"]["activations"]


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    return Plan(tmp_path, capsys)


def test_the_plan_of_stage2_counts_batch_memory_hours_and_disk(plan: Plan) -> None:
    found = plan("stage2_paper", "--gpus", "4", "--gradient_accumulation_steps", "2")
    assert [found["batch"][name] for name in ("per_device", "global", "rows_per_step")] == [512, 2048, 4096]
    trained = found["parameters"]["trained"]
    ddp, zero1, zero2, zero3, fsdp = found["strategies"].values()
    assert ddp["weights"] == pytest.approx(4 * trained, rel=0.01)
    assert (ddp["gradients"], ddp["states"]) == (4 * trained, 8 * trained)
    assert zero1["gradients"] == 2 * trained
    assert zero2["gradients"] == 2 * trained / 4
    assert zero3["weights"] == pytest.approx(2 * trained / 4, rel=0.01)
    assert fsdp["weights"] == pytest.approx(trained, rel=0.01)
    assert fsdp["states"] == 2 * trained
    assert found["of"] == {"rows": 2804 * 4096, "steps": 2804, "whole_run": True}
    assert found["disk"]["checkpoint"] == pytest.approx(12 * trained, rel=0.01)
    assert found["disk"]["checkpoints_kept"] == 5


def test_activations_shrink_with_chunks_and_grow_with_the_batch(plan: Plan) -> None:
    off = ("--gpus", "1", "--activation_checkpointing", "false")
    whole, chunked, double, recomputed = (
        plan.activations("stage2_paper", *arguments)
        for arguments in (
            off,
            (*off, "--tower_chunk_size", "32"),
            (*off, "--per_device_train_batch_size", "1024"),
            ("--gpus", "1"),
        )
    )
    assert chunked < 0.5 * whole
    assert double == pytest.approx(2 * whole, rel=0.1)
    assert recomputed < whole


def test_an_llm_that_runs_online_is_planned_without_gradients(plan: Plan) -> None:
    stored, online = (plan("stage2_paper", "--online_text_model", value) for value in ("false", "true"))
    assert online["parameters"]["trained"] == stored["parameters"]["trained"]
    assert online["parameters"]["frozen"] > stored["parameters"]["frozen"] + LLAMA["vocab_size"] * LLAMA["hidden_size"]
    assert online["strategies"]["DDP"]["gradients"] == stored["strategies"]["DDP"]["gradients"]
    assert online["flops_per_row"] > stored["flops_per_row"]


def test_an_llm_that_trains_with_lora_is_planned_with_its_activations(plan: Plan) -> None:
    online = ("--embedding_cache", "null", "--online_text_model", "true", "--longest", "24")
    frozen, lora = (plan("stage2_paper", *online, "--lora_rank", rank) for rank in ("0", "8"))
    added = lora["parameters"]["trained"] - frozen["parameters"]["trained"]
    # Two matrices of rank 8 beside each of the seven linear layers of 3 blocks.
    assert added == 3 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert lora["parameters"]["frozen"] == frozen["parameters"]["frozen"]
    ddp, before = lora["strategies"]["DDP"], frozen["strategies"]["DDP"]
    assert (ddp["gradients"], ddp["states"]) == tuple(factor * lora["parameters"]["trained"] for factor in (4, 8))
    assert ddp["activations"] > before["activations"]
    assert lora["flops_per_row"] > 1.5 * frozen["flops_per_row"]
    # In place of the LLM, a checkpoint has LoRA.
    assert lora["disk"]["checkpoint"] == 12 * lora["parameters"]["trained"]
    assert plan.command("stage2_paper", "--lora_rank", "8")[0] == 2


def test_a_distillation_takes_a_forward_pass_more_or_the_adapter_alone(plan: Plan) -> None:
    plain, averaged, texts = (
        plan("stage2_paper", *arguments)
        for arguments in (
            (),
            ("--ema_half_life", "9", "--distill_weight", "0.2"),
            ("--freeze_vision", "all", "--embedding_cache", "x", "--distill_from", "x"),
        )
    )
    # Forward and backward are three forward passes.
    assert averaged["flops_per_row"] == pytest.approx(4 / 3 * plain["flops_per_row"], rel=0.05)
    assert texts["parameters"]["trained"] < plain["parameters"]["trained"]
    assert texts["flops_per_row"] < plain["flops_per_row"]


def test_lora_trains_little_and_freezes_the_rest(plan: Plan) -> None:
    lora, whole = (plan("stage1_paper", "--lora_rank", rank) for rank in ("4", "0"))
    trained = lora["parameters"]["trained"]
    assert 0 < trained < 0.5 * lora["parameters"]["frozen"]
    assert lora["strategies"]["DDP"]["gradients"] == 4 * trained
    assert lora["strategies"]["DDP"]["states"] == 8 * trained
    assert whole["parameters"]["frozen"] < 0.01 * whole["parameters"]["trained"]
    assert not lora["of"]["whole_run"]
    assert plan("stage1_paper", "--rows", "40960")["of"] == {"rows": 40960, "steps": 80, "whole_run": True}


@pytest.mark.parametrize("config", [tiny.decoder_config("gemma2"), BertConfig(**BERT)], ids=["gemma2", "bert"])
def test_other_text_models_are_planned(config: PretrainedConfig, plan: Plan, tmp_path: Path) -> None:
    """One caps its logits, which only eager attention does, and one is an encoder with a verdict from no probe."""
    config.save_pretrained(tmp_path / "other")
    found = plan(
        "stage1_paper", "--model_name_or_path", str(tmp_path / "other"), "--lora_target_modules", "all-linear"
    )
    assert 0 < found["parameters"]["trained"] < found["parameters"]["frozen"]
    assert found["strategies"]["DDP"]["activations"] > 0


def test_embedding_takes_disk_for_each_caption_column(plan: Plan) -> None:
    found = plan("embed_paper", "--rows", "1000")
    assert found["of"]["captions"] == 3000
    assert found["disk"]["embeddings"] == 3000 * (64 * 2 + 16)
    assert list(found["strategies"]) == ["DDP"]


def test_a_small_run_is_shown_in_minutes_and_megabytes(plan: Plan) -> None:
    shown = plan.command("stage2_paper", "--gpus", "1", "--max_steps", "4", "--warm_start", "{max_steps: 2}")[1]
    assert re.search(r"memory of the GPU, .*minutes: below 0.1 for 4 steps of 2,048 rows.* MB", shown, re.DOTALL)
    assert "ZeRO" not in shown
    assert "warm start: a first part with frozen towers comes before it, which is not counted" in shown


def test_a_batch_that_does_not_fit_is_said_to(plan: Plan) -> None:
    code, shown, _ = plan.command("stage2_paper", "--gpu-memory", "0.05")
    assert code == 0
    assert "no" in shown.split("DDP")[1].splitlines()[0]
    assert "minutes: below 0.1 for 2,804 steps" in shown
    assert "512 per GPU, 4,096 in the loss" in shown


def test_chunks_under_zero3_are_shown_as_refused(plan: Plan) -> None:
    found = plan("stage2_paper", "--tower_chunk_size", "64")["strategies"]
    assert [name for name, entry in found.items() if entry["fits"] == "refused"] == ["ZeRO-3"]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ("--model_name_or_path", "meta-llama/Llama-3.1-8B-Instruct"),
            [
                "the config of meta-llama/Llama-3.1-8B-Instruct cannot be read",
                "Give --model-name-or-path a folder that contains its config.json",
                "LLM2CLIP-Llama-3.1-8B-Instruct-CC",
            ],
        ),
        (("--lora_rnak", "4"), ["there is no option --lora_rnak; did you mean --lora-rank?"]),
        (("--gpus_memory", "4"), ["there is no option --gpus_memory; did you mean --gpu-memory?"]),
        (("--gpus", "0"), ["gpus must be above 0, but is 0"]),
        (("--gpu", "A10"), ["the peak of gpu A10 is not known, only of A100, H100; give peak_tflops"]),
        (("--rows", "1000", "--gpus", "1024"), ["1,000 rows are fewer than one batch of"]),
        (("--optim", "adafactor"), ["the plan does not know the states of optim adafactor"]),
    ],
)
def test_mistakes_are_one_error(arguments: tuple[str, ...], messages: list[str], plan: Plan) -> None:
    code, _, error = plan.command("stage1_paper", *arguments)
    assert code == 2
    for message in messages:
        assert message in error


def test_what_a_run_leaves_on_the_disk_is_counted(plan: Plan) -> None:
    epochs = ("--rows", "20000", "--max_steps", "-1", "--num_train_epochs", "3", "--save_strategy", "epoch")
    assert plan("stage2_paper", *epochs)["disk"]["checkpoints_kept"] == 3
    assert plan("stage2_paper", *epochs, "--save_total_limit", "2")["disk"]["checkpoints_kept"] == 2
    stored = ("--freeze_vision_layers", "1", "--frozen_states_dir", "states", "--rows", "1000000")
    vision = tiny.vision_config()
    values = ((vision.image_size // vision.patch_size) ** 2 + 1) * vision.hidden_size
    assert plan("stage2_paper", *stored)["disk"]["frozen_states"] == 1_000_000 * 2 * values


def test_the_stage_of_a_recipe_is_known_by_its_name_or_its_fields(tmp_path: Path) -> None:
    for name in ("stage1_paper", "stage2_paper", "embed_paper", "mntp"):
        assert stage_of(find_recipe(name), load_recipe(find_recipe(name))) == name.split("_")[0]
    mine = tmp_path / "mine.yaml"
    assert stage_of(mine, {"vision_model_name_or_path": "x", "sources": []}) == "stage2"
    with pytest.raises(ValueError, match="stage1 and mntp have all of its fields"):
        stage_of(mine, {"model_name_or_path": "x", "dtype": "auto"})
    with pytest.raises(ValueError, match="no stage has all of its fields"):
        stage_of(mine, {"seeds": 3})
