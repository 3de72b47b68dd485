"""Optimiser groups with layer-wise learning rates, the warm-up cosine schedule, and the bound of the logit scale."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

MAX_LOGIT_SCALE = math.log(100)

TOWER_OF_CHILD = {
    "vision_model": "vision",
    "visual_projection": "vision",
    "text_model": "text",
    "text_adapter": "text",
}
# The one child of each tower whose numbered layers are the tower's layers.
BACKBONES = {"vision": "vision_model", "text": "text_model"}

NUMBERED_LAYER = re.compile(r"(?:^|\.)(?:blocks|layers?|stages)\.(\d+)(?=\.)")
# What comes before the first layer. CLIP's `class_embedding` and `pre_layrnorm` are missing on purpose: the original
# finds the layer by such a list of names, those two are not on it, and so its runs trained them at the full rate.
BEFORE_LAYERS = re.compile(
    r"(?:^|\.)(?:patch_embed(?:dings?)?|pos_embed|position_embeddings?|cls_token|mask_token|register_tokens"
    r"|embed_tokens)(?:\.|$)"
)
# Learned tokens and positions are inputs rather than weights: decay would pull them towards "no token".
NEVER_DECAYED = re.compile(
    r"(?:^|\.)(?:pos_embed|position_embeddings?|cls_token|class_embedding|mask_token|register_tokens|probe)(?:\.|$)"
)


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    vision_learning_rate: float | None = None,
    text_learning_rate: float | None = None,
    vision_weight_decay: float | None = None,
    text_weight_decay: float | None = None,
    vision_layer_decay: float = 0.85,
    text_layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Split the trainable parameters by tower, layer and weight decay, as the original's stage 2 does.

    Towers: `vision` is all under `vision_model` and `visual_projection`, `text` all under `text_model` and
    `text_adapter`, `other` the rest (the logit scale).

    Layers: in a tower of L layers, the embeddings have id 0, layer n (from 0) has n + 1, and all that follows the
    layers (final norm, pooling head, projection, adapter) has L + 1. A learning rate is multiplied by
    `layer_decay ** (L + 1 - id)`. As in the original, CLIP's `class_embedding` and `pre_layrnorm` have L + 1 too.
    Frozen layers count, so freezing the lower ones leaves the rates of the others alone. A layer decay of 1 or more
    means none.

    Weight decay: none for parameters with at most one dimension (biases, norms, layer scales, the logit scale), nor
    for learned tokens and positions.

    Args:
        model: An `LLM2CLIPModel`, also inside wrappers that put a prefix before its names (DDP, PEFT, compile).
        learning_rate: Of every tower without a rate of its own.
        weight_decay: Of every tower without a decay of its own.
        vision_learning_rate: Of the vision projection; the tower's layers have it times their factor.
        text_learning_rate: Of the adapter, and of the LLM where that is trained.
        vision_weight_decay: Of the vision tower and projection.
        text_weight_decay: Of the adapter, and of the LLM where that is trained.
        vision_layer_decay: Factor from one vision layer to the layer below.
        text_layer_decay: Factor from one layer of the LLM to the layer below.

    Returns:
        Groups for any torch optimiser, in the order of the model's parameters. Each holds `params`, `lr` (the layer's
        factor is in it, for schedulers multiply a group's own initial rate), `lr_scale` (the factor alone),
        `weight_decay`, `name` (such as `vision/layer3/decay`) and `param_names`.

    Raises:
        ValueError: A setting is out of range, nothing is trainable, or layer decay is asked for in a tower whose
            layers are not numbered in one row.
    """
    rates = {"vision": vision_learning_rate, "text": text_learning_rate, "other": learning_rate}
    decays = {"vision": vision_weight_decay, "text": text_weight_decay, "other": weight_decay}
    layer_decays = {"vision": vision_layer_decay, "text": text_layer_decay, "other": 1.0}
    _check_settings(rates, decays, layer_decays)

    parameters = [(name, *_split(name), parameter) for name, parameter in model.named_parameters()]
    trainable = {tower for _, tower, _, parameter in parameters if parameter.requires_grad}
    if not trainable:
        raise ValueError("The model has nothing to train: all its parameters have requires_grad=False.")
    num_layers = {
        tower: _count_layers([path for _, other, path, _ in parameters if other == tower], tower)
        for tower in trainable
        if layer_decays[tower] < 1
    }

    groups: dict[str, dict[str, Any]] = {}
    for name, tower, path, parameter in parameters:
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not path.endswith(".bias") and NEVER_DECAYED.search(path) is None
        labels, lr_scale = [tower], 1.0
        if tower in num_layers:
            layer = _layer_id(path, tower, num_layers[tower])
            labels.append(f"layer{layer}")
            lr_scale = layer_decays[tower] ** (num_layers[tower] + 1 - layer)
        group_name = "/".join([*labels, "decay" if decayed else "no_decay"])
        if group_name not in groups:
            rate, decay = rates[tower], decays[tower]
            groups[group_name] = {
                "params": [],
                "lr": (learning_rate if rate is None else rate) * lr_scale,
                "lr_scale": lr_scale,
                "weight_decay": (weight_decay if decay is None else decay) if decayed else 0.0,
                "name": group_name,
                "param_names": [],
            }
        groups[group_name]["params"].append(parameter)
        groups[group_name]["param_names"].append(name)
    return list(groups.values())


def warmup_cosine_schedule(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear warm-up, then half a cosine to zero, as a factor of each group's own initial learning rate.

    Step t (from 0) runs at `(t + 1) / warmup_steps` while t < warmup_steps, then at
    `(1 + cos(pi (t - warmup_steps) / (total_steps - warmup_steps))) / 2`. Without warm-up, step 0 has the full rate.

    Args:
        optimizer: Its groups' `lr` are the peaks.
        warmup_steps: Number of optimiser steps, possibly 0.
        total_steps: Number of optimiser steps including the warm-up; later steps stay at 0.

    Raises:
        ValueError: Unless 0 <= warmup_steps < total_steps.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"The warm-up must be shorter than the training, but has {warmup_steps} of {total_steps} optimiser steps."
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / (total_steps - warmup_steps)
        return (1 + math.cos(math.pi * min(progress, 1.0))) / 2

    return LambdaLR(optimizer, factor)


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> None:
    """Keep the log of the logit scale in [0, ln 100]; call it after each optimiser step (CLIP, section 2.5).

    Args:
        model: The unwrapped model, whose `logit_scale` is changed in place.
    """
    model.get_parameter("logit_scale").clamp_(0.0, MAX_LOGIT_SCALE)


def _check_settings(
    rates: dict[str, float | None], decays: dict[str, float | None], layer_decays: dict[str, float]
) -> None:
    for what, values in (("learning rate", rates), ("weight decay", decays)):
        for tower, value in values.items():
            if value is not None and value < 0:
                raise ValueError(f"The {what} of '{tower}' must not be negative, but is {value}.")
    for tower, value in layer_decays.items():
        if value <= 0:
            raise ValueError(f"{tower}_layer_decay must be above 0 (1 switches it off), but is {value}.")


def _split(name: str) -> tuple[str, str]:
    """A parameter's tower, and its name from the tower's child on, so without any wrapper's prefix."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part in TOWER_OF_CHILD:
            return TOWER_OF_CHILD[part], ".".join(parts[i:])
    return "other", name


def _layer_numbers(path: str, tower: str) -> list[int]:
    if not path.startswith(f"{BACKBONES[tower]}."):
        return []
    return [int(number) for number in NUMBERED_LAYER.findall(path)]


def _count_layers(paths: list[str], tower: str) -> int:
    numbers = [_layer_numbers(path, tower) for path in paths]
    nested = [path for path, found in zip(paths, numbers, strict=True) if len(found) > 1]
    if nested:
        raise ValueError(
            f"{tower}_layer_decay needs a tower whose layers are numbered in one row, but '{nested[0]}' is a layer in "
            f"a stage. Set {tower}_layer_decay=1.0 for this tower."
        )
    if not any(numbers):
        raise ValueError(
            f"{tower}_layer_decay below 1 needs numbered layers (blocks.N, layers.N or layer.N) under "
            f"'{BACKBONES[tower]}', but there are none. Set {tower}_layer_decay=1.0."
        )
    return 1 + max(number for found in numbers for number in found)


def _layer_id(path: str, tower: str, num_layers: int) -> int:
    for number in _layer_numbers(path, tower):
        return number + 1
    in_backbone = path.startswith(f"{BACKBONES[tower]}.")
    return 0 if in_backbone and BEFORE_LAYERS.search(path) is not None else num_layers + 1
