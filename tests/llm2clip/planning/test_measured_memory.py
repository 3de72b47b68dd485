"""What `llm2clip plan` counts is what training takes.

Each case trains two steps of a small model. The measured peak is that of torch's allocator, by the events of its
profiler: exact to the byte, and independent of how the plan counts.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
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
LLAMA = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EVA02 = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}


@dataclass(frozen=True)
class Case:
    """A stage with small models, and settings that change its memory."""

    name: str
    stage: str
    settings: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("stage 2, EVA02 and adapter", "stage2"),
    Case("stage 2, the same in chunks of 8", "stage2", {"tower_chunk_size": 8}),
    Case("stage 1, LoRA", "stage1"),
    Case("stage 1, LoRA, checkpointing", "stage1", {"activation_checkpointing": True}),
    Case("stage 1, all weights, bf16", "stage1", {"lora_rank": 0, "bf16": True}),
)
# One case of each stage is in `.ci/run`.
OFTEN = {"stage 1, LoRA, checkpointing", "stage 2, EVA02 and adapter"}
EACH = [pytest.param(case, id=case.name, marks=[] if case.name in OFTEN else pytest.mark.nightly) for case in CASES]


def settings_of(case: Case, folder: Path) -> Any:
    """Write the configs of the small models; return the settings of a case."""
    text = LLM2CLIPTextConfig(decoder_config=LlamaConfig(**LLAMA), max_text_length=TOKENS)
    text.save_pretrained(folder / "text")
    EVA02VisionConfig(**EVA02, image_size=112, patch_size=16).save_pretrained(folder / "vision")
    shared = {"output_dir": str(folder / "run"), "max_steps": 2, "save_strategy": "no", "report_to": "none"}
    shared |= {"per_device_train_batch_size": 32, "disable_tqdm": True, "warmup_steps": 0, **case.settings}
    if case.stage == "stage1":
        return Stage1Recipe(**shared, model_name_or_path=str(folder / "text"))
    towers = {"vision_model_name_or_path": str(folder / "vision"), "text_model_name_or_path": str(folder / "text")}
    return Stage2Recipe(**shared, **towers, projection_dim=128)


def trainer_of(case: Case, settings: Any, folder: Path) -> Any:
    generator = torch.Generator().manual_seed(0)
    if case.stage == "stage1":
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
@pytest.mark.parametrize("case", EACH)
def test_planned_memory_is_within_10_percent_of_the_measured_peak(case: Case, tmp_path: Path) -> None:
    settings = settings_of(case, tmp_path)
    planned = make_plan(PlanConfig(gpus=1), case.stage, settings)["strategies"]["DDP"]["total"]  # type: ignore[arg-type]
    trainer = trainer_of(case, settings, tmp_path)
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
