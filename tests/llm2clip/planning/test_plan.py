"""The plan of a recipe: from configs alone, in the numbers of its batch, for each way of sharding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm2clip import cli
from llm2clip.planning.plan import stage_of
from llm2clip.recipes import find_recipe, load_recipe
from tests.modeling_llm2clip import tiny

PACKAGED = "LLM2CLIP-SmolLM2-135M-CC"


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """Folders with a config.json and nothing else."""
    tiny.decoder_config().save_pretrained(tmp_path / "llm")
    tiny.vision_config().save_pretrained(tmp_path / "vision")
    return tmp_path


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def stage1(configs: Path, *arguments: str) -> tuple[str, ...]:
    llm = ("--model_name_or_path", str(configs / "llm"), "--dtype", "float32")
    return ("stage1_paper", *llm, "--longest", "24", *arguments)


def stage2(configs: Path, *arguments: str) -> tuple[str, ...]:
    towers = ("--vision_model_name_or_path", str(configs / "vision"), "--text_model_name_or_path", PACKAGED)
    return ("stage2_paper", *towers, *arguments)


def test_the_plan_of_stage2_counts_batch_memory_hours_and_disk(
    configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(capsys, *stage2(configs, "--gpus", "4", "--gradient_accumulation_steps", "2"))
    assert found["batch"]["per_device"] == 512
    assert found["batch"]["global"] == 2048
    assert found["batch"]["rows_per_step"] == 4096
    trained = found["parameters"]["trained"]
    ddp, zero1, zero2, zero3, fsdp = found["strategies"].values()
    assert ddp["weights"] == pytest.approx(4 * trained, rel=0.01)
    assert ddp["gradients"] == 4 * trained
    assert ddp["states"] == 8 * trained
    assert zero1["gradients"] == 2 * trained
    assert zero2["gradients"] == 2 * trained / 4
    assert zero3["weights"] == pytest.approx(2 * trained / 4, rel=0.01)
    assert fsdp["weights"] == pytest.approx(trained, rel=0.01)
    assert fsdp["states"] == 2 * trained
    assert found["of"] == {"rows": 2804 * 4096, "steps": 2804, "whole_run": True}
    assert found["disk"]["checkpoint"] == pytest.approx(12 * trained, rel=0.01)
    assert found["disk"]["checkpoints_kept"] == 5


def test_activations_shrink_with_chunks_and_grow_with_the_batch(
    configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    off = ("--gpus", "1", "--activation_checkpointing", "false")
    whole, chunked, double, recomputed = (
        plan(capsys, *stage2(configs, *arguments))["strategies"]["DDP"]["activations"]
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


def test_heads_on_top_of_a_closed_form_are_counted(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frozen = ("--freeze_vision", "all", "--embedding_cache", "x", "--projection_dim", "16")
    both = [
        plan(capsys, *stage2(configs, *frozen, "--alignment", kind))["parameters"]
        for kind in ("train", "closed_form_then_train")
    ]
    # A gated head and the linear maps, which stay as they are.
    assert both[1]["trained"] > both[0]["trained"]
    assert both[1]["frozen"] > both[0]["frozen"]
    assert cli.main(["plan", *stage2(configs, *frozen, "--alignment", "closed_form")]) == 2
    assert "closed_form trains nothing" in capsys.readouterr().err


def test_lora_trains_little_and_freezes_the_rest(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, whole = (plan(capsys, *stage1(configs, "--lora_rank", rank)) for rank in ("4", "0"))
    assert 0 < lora["parameters"]["trained"] < 0.5 * lora["parameters"]["frozen"]
    assert lora["strategies"]["DDP"]["gradients"] == 4 * lora["parameters"]["trained"]
    assert lora["strategies"]["DDP"]["states"] == 8 * lora["parameters"]["trained"]
    assert whole["parameters"]["frozen"] < 0.01 * whole["parameters"]["trained"]
    assert not lora["of"]["whole_run"]
    assert plan(capsys, *stage1(configs, "--rows", "40960"))["of"] == {"rows": 40960, "steps": 80, "whole_run": True}


def test_embedding_takes_disk_for_each_caption_column(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "embed_paper", "--text_model_name_or_path", PACKAGED, "--rows", "1000")
    assert found["of"]["captions"] == 3000
    assert found["disk"]["embeddings"] == 3000 * (576 * 2 + 16)
    assert list(found["strategies"]) == ["DDP"]


def test_mntp_counts_the_logits_of_masked_tokens(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("mntp", "--model_name_or_path", str(configs / "llm"), "--block_size", "32", "--lora_rank", "4")
    few, many = (
        plan(capsys, *arguments, "--mlm_probability", share)["strategies"]["DDP"]["activations"]
        for share in ("0.1", "0.8")
    )
    assert many > few


def test_a_batch_that_does_not_fit_is_said_to(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *stage2(configs, "--gpu-memory", "0.05")]) == 0
    shown = capsys.readouterr().out
    assert "no" in shown.split("DDP")[1].splitlines()[0]
    assert "hours:" in shown
    assert "512 per GPU, 4,096 in the loss" in shown


def test_chunks_under_zero3_are_shown_as_refused(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, *stage2(configs, "--tower_chunk_size", "64"))["strategies"]
    assert [name for name, entry in found.items() if entry["fits"] == "refused"] == ["ZeRO-3"]


def test_a_model_that_cannot_be_reached_is_one_error_that_says_what_to_give(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", "stage1_paper"]) == 2
    error = capsys.readouterr().err
    assert "the config of meta-llama/Llama-3.1-8B-Instruct cannot be read" in error
    assert "Give --model_name_or_path a folder that contains its config.json" in error
    assert "LLM2CLIP-Llama-3.1-8B-Instruct-CC" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lora_rnak", "4"), "there is no option --lora_rnak; did you mean --lora-rank?"),
        (("--gpus_memory", "4"), "there is no option --gpus_memory; did you mean --gpu-memory?"),
        (("--gpus", "0"), "gpus must be above 0, but is 0"),
        (("--optim", "adafactor"), "the plan does not know the states of optim adafactor"),
    ],
)
def test_mistakes_are_one_error(
    arguments: tuple[str, ...], message: str, configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *stage1(configs, *arguments)]) == 2
    assert message in capsys.readouterr().err


def test_the_stage_of_a_recipe_is_known_by_its_name_or_its_fields(tmp_path: Path) -> None:
    for name in ("stage1_paper", "stage2_paper", "embed_paper", "mntp"):
        path = find_recipe(name)
        assert stage_of(path, load_recipe(path)) == name.split("_")[0]
    path = tmp_path / "mine.yaml"
    assert stage_of(path, {"vision_model_name_or_path": "x", "sources": []}) == "stage2"
    with pytest.raises(ValueError, match="stage1 and mntp have all of its fields; say which stage it is for"):
        stage_of(path, {"model_name_or_path": "x", "lora_rank": 4})
    path.write_text(yaml.safe_dump({"seeds": 3}))
    with pytest.raises(ValueError, match="no stage has all of its fields"):
        stage_of(path, load_recipe(path))
