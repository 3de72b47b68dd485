"""Compare the memory that `llm2clip plan` counts with that of training: `python -m benchmarks.scale.plan_memory`.

Each case trains two steps of a small model in a process of its own. The measured peak is that of torch's allocator, by
the events of its profiler: exact to the byte, and independent of how the plan counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 2**20
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


def write_configs(folder: Path) -> None:
    """Write the configs of the small models, without weights."""
    from transformers import LlamaConfig

    from modeling_llm2clip import EVA02VisionConfig, LLM2CLIPTextConfig

    text = LLM2CLIPTextConfig(decoder_config=LlamaConfig(**LLAMA), max_text_length=TOKENS)
    text.save_pretrained(folder / "text")
    EVA02VisionConfig(**EVA02, image_size=112, patch_size=16).save_pretrained(folder / "vision")


def settings_of(case: Case, folder: Path) -> Any:
    """The settings of a case."""
    from llm2clip.trainers.stage1_config import Stage1Recipe
    from llm2clip.trainers.stage2_config import Stage2Recipe

    shared = {"output_dir": str(folder / "run"), "max_steps": 2, "save_strategy": "no", "report_to": "none"}
    shared |= {"per_device_train_batch_size": 32, "disable_tqdm": True, "warmup_steps": 0, **case.settings}
    if case.stage == "stage1":
        return Stage1Recipe(**shared, model_name_or_path=str(folder / "text"))
    towers = {"vision_model_name_or_path": str(folder / "vision"), "text_model_name_or_path": str(folder / "text")}
    return Stage2Recipe(**shared, **towers, projection_dim=128)


def planned_bytes(case: Case, folder: Path) -> float:
    """The memory that the plan counts on one device."""
    from llm2clip.planning.plan import PlanConfig, make_plan

    plan = make_plan(PlanConfig(gpus=1), case.stage, settings_of(case, folder))
    return plan["strategies"]["DDP"]["total"]


def measured_bytes(case: Case, folder: Path) -> float:
    """Train two steps and return the peak of the allocator with the weights; for a fresh process."""
    from torch.profiler import ProfilerActivity, profile

    trainer = _trainer(case, folder)
    weights = sum(x.nbytes for x in (*trainer.model.parameters(), *trainer.model.buffers()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return weights + peak


def _trainer(case: Case, folder: Path) -> Any:
    import torch

    from llm2clip import Stage1Trainer, Stage2Trainer
    from llm2clip.planning.models import trained_joint_model
    from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel

    settings = settings_of(case, folder)
    generator = torch.Generator().manual_seed(0)
    if case.stage == "stage1":
        model = LLM2CLIPTextModel(LLM2CLIPTextConfig.from_pretrained(folder / "text"))
        ids = torch.randint(LLAMA["vocab_size"], (128, 2, TOKENS), generator=generator)
        return Stage1Trainer(
            model=model, args=settings, train_dataset=list(range(128)), data_collator=lambda rows: _pairs(ids[rows])
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


def _pairs(ids: Any) -> dict[str, Any]:
    import torch

    mask = torch.ones(len(ids), TOKENS, dtype=torch.long)
    return {
        role: {"input_ids": ids[:, number], "attention_mask": mask, "pooling_mask": mask}
        for number, role in enumerate(("anchor", "positive"))
    }


def compare(case: Case) -> tuple[float, float]:
    """The planned and the measured bytes of a case, each from a process of its own."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for what in ("planned", "measured"):
            command = [sys.executable, "-m", "benchmarks.scale.plan_memory", what, case.name, folder]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(output.splitlines()[-1]))
    return found[0], found[1]


def main(arguments: Sequence[str]) -> None:
    """Print the comparison of all cases, or one number of one case."""
    if arguments:
        what, name, folder = arguments
        case = next(case for case in CASES if case.name == name)
        write_configs(Path(folder))
        number = (planned_bytes if what == "planned" else measured_bytes)(case, Path(folder))
        print(f"\n{json.dumps(number)}")
        return
    print("| case | planned | measured | planned / measured |\n| --- | ---: | ---: | ---: |")
    for case in CASES:
        planned, measured = compare(case)
        print(f"| {case.name} | {planned / MIB:,.1f} MiB | {measured / MIB:,.1f} MiB | {planned / measured:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
