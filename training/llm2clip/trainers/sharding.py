"""What shards a model over processes: FSDP or DeepSpeed, by accelerate, or neither."""

from __future__ import annotations

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from llm2clip.trainers.base_config import StageConfig

NEEDS = {
    "FSDP": "FSDP needs several processes on GPUs.",
    "DeepSpeed": "DeepSpeed needs `accelerate launch` or the deepspeed launcher, and ACCELERATE_USE_CPU unset.",
}
# Where accelerate ignores a request for FSDP.
WITHOUT_FSDP = (DistributedType.NO, DistributedType.MULTI_CPU)


def refuse_unsharded(args: StageConfig) -> None:
    """Refuse a run whose launch asks for FSDP or DeepSpeed where accelerate would train without it.

    On a CPU, accelerate (1.15) says nothing and trains data parallel, each process with the whole model. Before its
    state is complete, only the requests are refused that cannot be met.

    Raises:
        ValueError: The run would not get what it asked for.
    """
    # The device of the settings makes the state.
    device, complete = args.device, bool(AcceleratorState._shared_state)
    given = PartialState().distributed_type
    for name, setting, wanted in (
        ("FSDP", args.fsdp, DistributedType.FSDP),
        ("DeepSpeed", args.deepspeed, DistributedType.DEEPSPEED),
    ):
        variable = f"ACCELERATE_USE_{name.upper()}"
        asked = bool(setting) or os.environ.get(variable, "").lower() == "true"
        if not asked or given == wanted:
            continue
        if complete or (wanted == DistributedType.FSDP and given in WITHOUT_FSDP):
            processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
            source = f"the setting {name.lower()}" if setting else f"the launch ({variable}=true)"
            raise ValueError(
                f"{source} asks for {name}, but accelerate would train without it, each process with the whole model: "
                f"here are {processes} on {device.type.upper()}. {NEEDS[name]} Launch there, or train data parallel "
                "with torchrun or the launch configuration ddp_8gpu.yaml."
            )
