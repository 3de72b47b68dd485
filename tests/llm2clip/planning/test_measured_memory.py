"""What `llm2clip plan` counts is what two steps of a small model take, by the events of torch's allocator."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from llm2clip import Stage1Trainer, Stage2Trainer
from llm2clip.planning.models import trained_joint_model
from llm2clip.planning.plan import PlanConfig, make_plan
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip import EVA02VisionConfig, LLM2CLIPTextConfig, LLM2CLIPTextModel

TOKENS = 96
EVA02 = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
LLAMA = EVA02 | {"vocab_size": 512, "num_key_value_heads": 2}


# A stage with small models, and settings that change its memory.
CASES = {
    "stage 1, LoRA, checkpointing": ("stage1", {"activation_checkpointing": True}),
    "stage 1, all weights, bf16": ("stage1", {"lora_rank": 0, "bf16": True}),
    "stage 2, EVA02 and adapter": ("stage2", {}),
    "stage 2, chunks of 8": ("stage2", {"tower_chunk_size": 8}),
}
# One case of each stage is in `.ci/run`.
RARELY = {"stage 1, all weights, bf16", "stage 2, chunks of 8"}
EACH = [pytest.param(*case, id=name, marks=[pytest.mark.nightly] * (name in RARELY)) for name, case in CASES.items()]


def settings_of(stage: str, changes: dict[str, Any], folder: Path) -> Any:
    """Write the configs of the small models; return the settings of a case."""
    text = LLM2CLIPTextConfig(decoder_config=LlamaConfig(**LLAMA), max_text_length=TOKENS)
    text.save_pretrained(folder / "text")
    EVA02VisionConfig(**EVA02, image_size=112, patch_size=16).save_pretrained(folder / "vision")
    shared = {"output_dir": str(folder / "run"), "max_steps": 2, "save_strategy": "no", "report_to": "none"}
    shared |= {"per_device_train_batch_size": 32, "disable_tqdm": True, "warmup_steps": 0, **changes}
    if stage == "stage1":
        return Stage1Recipe(**shared, model_name_or_path=str(folder / "text"))
    towers = {"vision_model_name_or_path": str(folder / "vision"), "text_model_name_or_path": str(folder / "text")}
    return Stage2Recipe(**shared, **towers, projection_dim=128)


def trainer_of(stage: str, settings: Any, folder: Path) -> Any:
    generator = torch.Generator().manual_seed(0)
    if stage == "stage1":
        model = LLM2CLIPTextModel(LLM2CLIPTextConfig.from_pretrained(folder / "text"))
        ids = torch.randint(LLAMA["vocab_size"], (128, 2, TOKENS), generator=generator)
        return Stage1Trainer(
            model=model, args=settings, train_dataset=list(range(128)), data_collator=lambda rows: pairs(ids[rows])
        )
    joint = trained_joint_model(settings).to_empty(device="cpu")
    for parameter in joint.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    images = torch.randn(128, 3, 112, 112, generator=generator)
    captions = torch.randn(128, LLAMA["hidden_size"], generator=generator)
    return Stage2Trainer(
        model=joint,
        args=settings,
        train_dataset=list(range(128)),
        data_collator=lambda rows: {"pixel_values": images[rows], "llm_embeds": captions[rows]},
    )


def pairs(ids: torch.Tensor) -> dict[str, Any]:
    mask = torch.ones(len(ids), TOKENS, dtype=torch.long)
    return {
        role: {"input_ids": ids[:, number], "attention_mask": mask, "pooling_mask": mask}
        for number, role in enumerate(("anchor", "positive"))
    }


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "changes"), EACH)
def test_planned_memory_is_within_10_percent_of_the_measured_peak(
    stage: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = settings_of(stage, changes, tmp_path)
    planned = make_plan(PlanConfig(gpus=1), stage, settings)["strategies"]["DDP"]["total"]  # type: ignore[arg-type]
    trainer = trainer_of(stage, settings, tmp_path)
    weights = sum(x.nbytes for x in (*trainer.model.parameters(), *trainer.model.buffers()))
    gc.collect()  # what is freed later would count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert planned == pytest.approx(weights + peak, rel=0.1)
