"""What shards a model over processes: FSDP or DeepSpeed, by accelerate, or neither."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from accelerate import Accelerator
from accelerate.state import PartialState, is_initialized
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from llm2clip.trainers.base_config import StageConfig

# A method of a divided model that does nothing.
BEGIN = "begin_forward_passes"
SCALARS = ("logit_scale", "logit_bias")
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
    device, complete = args.device, is_initialized()
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


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP or DeepSpeed trains the model, in part or as a whole."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def is_divided(accelerator: Accelerator) -> bool:
    """Whether no process has the whole weights in its model: FSDP, and stage 3 of DeepSpeed's ZeRO."""
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return accelerator.distributed_type == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3)


def whole_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Gather the weights of a wrapped model; called in all processes, of which the main one gets them on the CPU."""
    state = accelerator.get_state_dict(model)
    return with_scalars({} if state is None else state)


def undivided(model: nn.Module) -> Any:
    """Return a view of a model, with all its parts, whose class is that from before FSDP: the class to save."""
    if not isinstance(model, FSDPModule):
        return model
    class_before: Any = type(model).__bases__[1]
    view = class_before.__new__(class_before)
    view.__dict__.update(model.__dict__)
    return view


@contextmanager
def undivided_building(args: StageConfig) -> Iterator[None]:
    """Within this context, models are built whole, also with ZeRO-3, for which transformers divides them at once.

    That takes all processes, and parameters that have a dimension.
    """
    plugin: Any = args.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(getattr(args, "hf_deepspeed_config", None) or plugin.dschf)


@contextmanager
def gathered(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Within this context, each process has the whole weights of a wrapped model that FSDP or ZeRO-3 divides.

    Evaluation needs it: it calls parts of the model, and processes have different numbers of batches, whereas both
    gather weights by communicating in each forward pass.
    """
    if is_divided(accelerator) and accelerator.distributed_type == DistributedType.DEEPSPEED:
        import deepspeed  # only where a run uses it

        with deepspeed.zero.GatheredParameters([*model.parameters()]):
            yield
        return
    _begin_at_the_root(model)
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        reshards = bool(accelerator.state.fsdp_plugin.reshard_after_forward) if modules else False
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(reshards, recurse=False)


def _begin_at_the_root(model: nn.Module) -> None:
    """Let the root of a divided model run first, as FSDP expects, also where an evaluation precedes the training."""
    if isinstance(model, FSDPModule) and not hasattr(model, BEGIN):
        setattr(model, BEGIN, lambda: None)
        register_fsdp_forward_method(cast(nn.Module, model), BEGIN)
        getattr(model, BEGIN)()


def give_scalars_a_dimension(model: nn.Module) -> None:
    """Make a model's scalar parameters vectors of one element, which is what FSDP and DeepSpeed can divide.

    Folders keep them as scalars; see [`with_scalars`].
    """
    for name in SCALARS:
        scalar = getattr(model, name, None)
        if scalar is not None and scalar.ndim == 0:
            setattr(model, name, nn.Parameter(scalar.detach().reshape(1), scalar.requires_grad))


def with_scalars(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo [`give_scalars_a_dimension`] in the weights of a model."""
    return {name: value.reshape(()) if name in SCALARS else value for name, value in state.items()}


def value_of(parameter: Any) -> float:
    """Read a parameter of one element, wherever it lies; called in all processes."""
    parameter = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return float(parameter.detach().reshape(()))
