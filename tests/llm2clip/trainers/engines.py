"""Runs of stage 2 with one engine on the ranks that start this script, one after the other, and what each came to.

Called with a JSON file of `engine` (`ddp`, `fsdp` or `one`, a process alone) and `cells`, settings of runs by their
names. Each rank writes beside it a record of its runs: losses, what the loss was given, what was saved, the error.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, prepare_multi_gpu_env

from llm2clip.command_line.processes import leave_process_group
from llm2clip.command_line.settings import build_config
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from modeling_llm2clip import LLM2CLIPModel
from tests.llm2clip.trainers.stages import launch_configuration, losses

# With what FSDP exchanges gradients, in torch 2.13 and before.
REDUCE = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
RANK = int(os.environ.get("RANK", "0"))


def start_fsdp(folder: Path) -> None:
    """Do what `accelerate launch` does with the packaged configuration, and call the processes GPUs (gloo_as_gpus)."""
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump({**launch_configuration("fsdp.yaml"), "num_processes": 2, "use_cpu": True}))
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), __file__]))
    launched = prepare_multi_gpu_env(args)
    os.environ.update({name: x for name, x in launched.items() if name.startswith(("FSDP_", "ACCELERATE_"))})
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


class Seen:
    """What the loss was given, and how gradients were exchanged, while it is in place."""

    def __init__(self) -> None:
        self.dtypes: set[str] = set()
        self.reduced: set[str] = set()
        self.scales: list[float] = []

    def __enter__(self) -> Seen:
        self.before = Stage2Trainer.contrastive_loss, getattr(dist, REDUCE)
        loss, reduce = self.before

        def watched_loss(trainer: Any, batch: Any) -> Any:
            self.dtypes |= {str(x.dtype) for x in (*batch.embeds.values(), batch.logit_scale)}
            self.scales.append(float(batch.logit_scale))
            return loss(trainer, batch)

        def watched_reduce(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            self.reduced.add(str(input.dtype))
            return reduce(output, input, *args, **kwargs)

        Stage2Trainer.contrastive_loss = watched_loss
        setattr(dist, REDUCE, watched_reduce)
        return self

    def __exit__(self, *_: Any) -> None:
        Stage2Trainer.contrastive_loss = self.before[0]
        setattr(dist, REDUCE, self.before[1])


def train(settings: dict[str, Any], resume: bool = False) -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    run_stage2.run(build_config(Stage2Recipe, settings), resume=resume)


def record(settings: dict[str, Any]) -> dict[str, Any]:
    """Train, load the result and a checkpoint, and resume the run as if it had ended after its first step."""
    folder = Path(settings["output_dir"])
    found: dict[str, Any] = {}
    with Seen() as seen:
        try:
            train(settings)
            found |= {"dtypes": sorted(seen.dtypes), "reduced": sorted(seen.reduced), "scales": seen.scales}
            if RANK == 0:
                found |= {"losses": losses(folder), "weights": describe(folder)}
                shutil.rmtree(folder / "checkpoint-2")
                LLM2CLIPModel.from_pretrained(folder / "checkpoint-1")
            if dist.is_initialized():
                dist.barrier()
            train(settings, resume=True)
            if RANK == 0:
                found |= {"resumed": losses(folder), "resumed_weights": describe(folder)}
        except Exception:
            found["error"] = traceback.format_exc()
    return found


def describe(folder: Path) -> dict[str, float]:
    """Load a result with its LLM; of each trained part, the sum of the absolute weights."""
    model = LLM2CLIPModel.from_pretrained(folder)
    assert model.text_model is not None
    parts = {"scale": model.logit_scale}
    parts |= dict.fromkeys(("vision_model", "visual_projection", "text_adapter", "text_model"))
    return {
        name: float(sum(x.abs().sum().double() for x in getattr(model, name).parameters())) if x is None else float(x)
        for name, x in parts.items()
    }


def main(path: str) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    order = json.loads(Path(path).read_text())
    if order["engine"] == "fsdp":
        start_fsdp(Path(path).parent)
    records = {}
    for name, settings in order["cells"].items():
        records[name] = record(settings)
        Path(path).with_name(f"records-{RANK}.json").write_text(json.dumps(records))
    leave_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
