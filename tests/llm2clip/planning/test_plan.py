"""The plan of a recipe: from configs alone, in the numbers of its batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig, PretrainedConfig

from llm2clip import cli
from llm2clip.recipes import find_recipe, load_recipe
from modeling_llm2clip import LLM2CLIPTextConfig
from tests.builders import tiny

RECIPES, STAGES = find_recipe("mntp").parent, ("stage1", "stage2", "embed", "mntp")
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
        code = cli.main(["plan", recipe, *self.arguments.get(recipe, ()), *arguments])
        return code, *self.capsys.readouterr()

    def __call__(self, recipe: str, *arguments: str) -> dict[str, Any]:
        code, shown, _ = self.command(recipe, *arguments, "--json")
        assert code == 0
        return json.loads(shown)


@pytest.fixture
def plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    return Plan(tmp_path, capsys)


@pytest.mark.parametrize(
    "recipe", sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem.startswith(STAGES))
)
def test_every_packaged_recipe_is_planned(recipe: str, plan: Plan, tmp_path: Path) -> None:
    # More layers than a recipe freezes.
    tiny.joint_config(tiny.vision_config(num_hidden_layers=13)).save_pretrained(tmp_path / "joint")
    given = plan.arguments.get(f"{recipe.partition('_')[0]}_paper", plan.arguments["mntp"])
    if load_recipe(find_recipe(recipe)).get("model_name_or_path", "").startswith("runs"):
        given = ("--model_name_or_path", str(tmp_path / "joint"))
    plan.arguments[recipe] = given
    code, shown, error = plan.command(recipe)
    assert (code, error) == (0, "")
    assert "not measured" in shown


def test_the_plan_of_stage2_counts_batch_memory_hours_and_disk(plan: Plan) -> None:
    found = plan("stage2_paper", "--gpus", "4", "--gradient_accumulation_steps", "2")
    assert (found["batch"], found["rows_per_step"]) == (2048, 4096)
    trained = found["parameters"]["trained"]
    ddp = found["memory"]["DDP"]
    assert ddp["weights"] == pytest.approx(4 * trained, rel=0.01)
    assert ddp["optimizer"] == 8 * trained
    assert (found["steps"], found["rows"], found["whole_run"]) == (2804, 2804 * 4096, True)
    assert found["disk"]["checkpoint"] == pytest.approx(12 * trained, rel=0.01)
    assert found["disk"]["checkpoints_kept"] == 5
    assert found["measured"] is False


def test_an_llm_that_runs_online_is_planned_without_gradients(plan: Plan) -> None:
    stored, online = (plan("stage2_paper", "--online_text_model", value) for value in ("false", "true"))
    assert online["parameters"]["trained"] == stored["parameters"]["trained"]
    assert online["parameters"]["frozen"] > stored["parameters"]["frozen"] + LLAMA["vocab_size"] * LLAMA["hidden_size"]
    assert online["memory"]["DDP"]["gradients"] == stored["memory"]["DDP"]["gradients"]
    assert online["memory"]["DDP"]["activations"] > stored["memory"]["DDP"]["activations"]
    assert online["flops_per_row"] > stored["flops_per_row"]


def test_an_llm_that_trains_with_lora_is_planned_with_its_activations(plan: Plan) -> None:
    online = ("--embedding_cache", "null", "--online_text_model", "true", "--longest", "24")
    frozen, lora = (plan("stage2_paper", *online, "--lora_rank", rank) for rank in ("0", "8"))
    added = lora["parameters"]["trained"] - frozen["parameters"]["trained"]
    # Two matrices of rank 8 beside each of the seven linear layers of 3 blocks.
    assert added == 3 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert lora["parameters"]["frozen"] == frozen["parameters"]["frozen"]
    assert lora["memory"]["DDP"]["optimizer"] == 8 * lora["parameters"]["trained"]
    assert lora["flops_per_row"] > 1.5 * frozen["flops_per_row"]
    # In place of the LLM, a checkpoint has LoRA.
    assert lora["disk"]["checkpoint"] == 12 * lora["parameters"]["trained"]
    assert plan.command("stage2_paper", "--lora_rank", "8")[0] == 2


def test_lora_trains_little_and_freezes_the_rest(plan: Plan) -> None:
    lora, whole = plan("stage1_paper", "--lora_rank", "4"), plan("stage1_paper", "--lora_rank", "0", "--rows", "40960")
    assert 0 < lora["parameters"]["trained"] < 0.5 * lora["parameters"]["frozen"]
    assert whole["parameters"]["frozen"] < 0.01 * whole["parameters"]["trained"]
    assert not lora["whole_run"]
    assert (whole["rows"], whole["steps"], whole["whole_run"]) == (40960, 80, True)


def test_a_frozen_vision_tower_is_planned_with_stored_features(plan: Plan) -> None:
    table = ("--sources", "[{path: pictures, caption_columns: [caption]}]")
    trained, frozen = (plan("stage2_paper", *table, *frozen) for frozen in ((), ("--freeze_vision", "all")))
    vision = 1 - frozen["flops_per_row"] / trained["flops_per_row"]
    assert 0 < vision < 1
    assert 0 < frozen["parameters"]["trained"] < trained["parameters"]["trained"]
    assert frozen["memory"]["DDP"]["activations"] < trained["memory"]["DDP"]["activations"]


@pytest.mark.parametrize("config", [tiny.decoder_config("gemma2"), BertConfig(**BERT)], ids=["gemma2", "bert"])
def test_other_text_models_are_planned(config: PretrainedConfig, plan: Plan, tmp_path: Path) -> None:
    """One caps its logits, which only eager attention does, and one is an encoder with a verdict from no probe."""
    config.save_pretrained(tmp_path / "other")
    found = plan(
        "stage1_paper", "--model_name_or_path", str(tmp_path / "other"), "--lora_target_modules", "all-linear"
    )
    assert 0 < found["parameters"]["trained"] < found["parameters"]["frozen"]
    assert found["memory"]["DDP"]["activations"] > 0


def test_embedding_takes_disk_for_each_caption_column(plan: Plan) -> None:
    found = plan("embed_paper", "--rows", "1000")
    assert found["captions"] == 3000
    assert found["disk"]["embeddings"] == 3000 * (64 * 2 + 16)
    assert list(found["memory"]) == ["DDP"]
    layer = found["memory"]["DDP"]["activations"]
    # By default as many captions as have 16,384 tokens.
    half = plan("embed_paper", "--batch-size", "256")["memory"]["DDP"]["activations"]
    assert layer == pytest.approx(2 * half, rel=0.01)


def test_mntp_keeps_the_logits_of_masked_tokens(plan: Plan) -> None:
    few, many = (
        plan("mntp", "--bf16", "false", "--mlm_probability", share)["memory"]["DDP"] for share in ("0.125", "0.25")
    )
    # Their log-probabilities are kept in float32: an eighth of 32 blocks of 32 tokens.
    assert many["activations"] - few["activations"] >= 32 * 32 // 8 * tiny.decoder_config().vocab_size * 4


def test_a_plan_is_shown_with_what_it_counts_and_that_nobody_measured_it(plan: Plan) -> None:
    shown = plan.command("stage2_paper", "--gpus", "1", "--max_steps", "4")[1]
    assert re.search(r"memory of the GPU, .*minutes: 0.0 for 4 steps of 2,048 rows.* MB", shown, re.DOTALL)
    assert "not measured: counted from shapes, and confirmed on no GPU" in shown
    assert "FSDP" not in shown


def test_a_batch_that_does_not_fit_is_said_to(plan: Plan) -> None:
    code, shown, _ = plan.command("stage2_paper", "--gpu-memory", "0.05")
    assert code == 0
    assert "no" in shown.split("DDP")[1].splitlines()[0]


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
        (("--lora_rnak", "4"), ["there is no option --lora_rnak; did you mean '--lora-rank'?"]),
        (("--gpus_memory", "4"), ["there is no option --gpus_memory; did you mean '--gpu-memory'?"]),
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


def test_a_recipe_whose_name_begins_with_no_stage_needs_one(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("{}")
    assert "say it: --stage stage1|stage2|embed|mntp" in plan.command(str(tmp_path / "mine.yaml"))[2]
    assert plan.command(str(tmp_path / "mine.yaml"), "--stage", "embed", *plan.arguments["embed_paper"])[0] == 0
