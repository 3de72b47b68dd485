"""What can differ on a GPU: `make test-cuda`. Without one, each test says so and is skipped."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoProcessor

from llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, Stage1Config, Stage2Config
from llm2clip.command_line.settings import build_config
from llm2clip.losses import clip_loss
from llm2clip.trainers import run_stage1, run_stage2
from llm2clip.trainers.grad_cache import in_chunks
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip import EVA02VisionModel
from tests.builders import small_runs, tiny
from tests.llm2clip.conftest import Inputs
from tests.processes import run_python

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]


def stage2_fields(folder: Path, inputs: Inputs, **changes: Any) -> dict[str, Any]:
    return small_runs.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache) | {"use_cpu": False, **changes}


def stage2(folder: Path, inputs: Inputs, resume: bool = False, **changes: Any) -> list[float]:
    """The losses of a run."""
    run_stage2.run(build_config(Stage2Recipe, stage2_fields(folder, inputs, **changes)), resume=resume)
    return losses_in(folder)


def losses_in(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_run_on_a_gpu_is_that_of_a_cpu(inputs: Inputs, tmp_path: Path) -> None:
    expected = stage2(tmp_path / "cpu", inputs, use_cpu=True)
    assert stage2(tmp_path / "gpu", inputs) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"tower_chunk_size": 3},
        {"activation_checkpointing": True},
        {"freeze_vision_layers": 1},
        {"freeze_vision": "all"},
        {"torch_compile": True, "tower_chunk_size": 8},
        {"eval_strategy": "steps", "eval_steps": 3},
        {"dataloader_num_workers": 2, "image_backend": "fast"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_settings_of_stage2_run_in_bfloat16(changes: dict[str, Any], inputs: Inputs, tmp_path: Path) -> None:
    expected = stage2(tmp_path / "whole", inputs, bf16=True, freeze_vision=changes.get("freeze_vision", "none"))
    found = stage2(tmp_path / "run", inputs, bf16=True, **changes)
    # Another decoder and frozen layers train otherwise.
    same = not {"image_backend", "freeze_vision_layers"} & set(changes)
    assert len(found) == 6
    assert not same or found == pytest.approx(expected, abs=5e-2)


@pytest.mark.parametrize("changes", [{}, {"tower_chunk_size": 3}, {"lora_rank": 0}])
def test_stage1_runs_in_bfloat16_and_saves_what_a_cpu_reads(
    changes: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    fields = {**small_runs.stage1_fields(tmp_path, inputs.llm), "use_cpu": False, "bf16": True, **changes}
    run_stage1.run(build_config(Stage1Recipe, fields))
    model = LLM2CLIPTextModel.from_pretrained(tmp_path)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_resumed_run_equals_an_unbroken_one(inputs: Inputs, tmp_path: Path) -> None:
    whole = stage2(tmp_path, inputs)
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    assert stage2(tmp_path, inputs, resume=True) == pytest.approx(whole, abs=1e-4)


def test_the_host_does_not_wait_for_the_loss() -> None:
    image, text = (torch.randn(1024, 32, device="cuda", requires_grad=True) for _ in range(2))
    scale = torch.tensor(2.0, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        clip_loss(image, text, scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.grad.isfinite().all() for x in (image, text, scale))


def test_chunks_draw_the_random_numbers_of_the_gpu_again() -> None:
    fields = {"patch_dropout": 0.5, "drop_path_rate": 0.3, "attention_dropout": 0.2, "initializer_range": 0.1}
    pixels = torch.randn(10, 3, 28, 28, device="cuda")

    def embed(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor]:
        return (nn.functional.normalize(model(**inputs).pooler_output, dim=-1),)

    found = []
    for kept in (True, False):
        torch.manual_seed(0)
        model = EVA02VisionModel(tiny.vision_config(**fields)).train().cuda()
        torch.manual_seed(5)
        if kept:
            images = torch.cat([embed(model, {"pixel_values": chunk})[0] for chunk in pixels.split([2, 4, 4])])
        else:
            (images,) = in_chunks(embed, model, {"pixel_values": pixels}, 4)
        images.square().mul(torch.arange(10, device="cuda")[:, None]).sum().backward()
        found.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert found[0]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_embeddings_in_16_bit_are_near_those_in_float32(dtype: torch.dtype, saved_model: Path) -> None:
    processor = AutoProcessor.from_pretrained(saved_model)
    expected = LLM2CLIPModel.from_pretrained(saved_model)
    half = LLM2CLIPModel.from_pretrained(saved_model, dtype=dtype).to("cuda")
    for name, values in (("encode_text", tiny.CAPTIONS), ("encode_image", tiny.IMAGES)):
        pairs = getattr(half, name)(values, processor).float().cpu() * getattr(expected, name)(values, processor)
        assert pairs.sum(dim=-1).min() > 0.99, name


def test_several_gpus_without_a_launcher_are_one(tmp_path: Path) -> None:
    assert [kind(output_dir=str(tmp_path)).n_gpu for kind in (Stage1Config, Stage2Config)] == [1, 1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA GPUs")
@pytest.mark.parametrize("configuration", ["ddp_8gpu.yaml", "fsdp.yaml"])
def test_two_gpus_equal_one(configuration: str, inputs: Inputs, tmp_path: Path) -> None:
    expected = stage2(tmp_path / "one", inputs)
    fields = stage2_fields(tmp_path / "two", inputs)
    launch = yaml.safe_load((files("llm2clip.recipes") / "accelerate" / configuration).read_text())
    (tmp_path / "launch.json").write_text(json.dumps({**launch, "num_processes": 2}))
    halved = {**fields, "per_device_train_batch_size": fields["per_device_train_batch_size"] // 2}
    (tmp_path / "recipe.json").write_text(json.dumps(halved))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launch.json")]
    run_python([*launcher, "--main_process_port", "0", "-m", "llm2clip", "stage2", str(tmp_path / "recipe.json")])
    assert losses_in(tmp_path / "two") == pytest.approx(expected, abs=1e-3)
