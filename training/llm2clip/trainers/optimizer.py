"""Parameter groups with layer-wise learning rates, the cosine schedule with warm-up, and the logit scale's limit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

MAX_LOGIT_SCALE = math.log(100)

TOWER_OF_CHILD = {
    "vision_model": "vision", "visual_projection": "vision", "text_model": "text", "text_adapter": "text",
}  # fmt: skip
# The child of each tower whose numbered layers count.
BACKBONES = {"vision": "vision_model", "text": "text_model"}

NUMBERED_LAYER = re.compile(r"(?:^|\.)(?:blocks|layers?|stages)\.(\d+)(?=\.)")
# Settings of the optimizer's parameter groups.
GROUP_SETTINGS = (
    *("learning_rate", "vision_learning_rate", "text_learning_rate", "weight_decay", "vision_layer_decay"),
)
# How values of `optim` begin that project gradients to a low rank, and end that update within the backward pass.
LOW_RANK = ("galore", "apollo")
IN_BACKWARD = ("lomo", "layerwise")
# Settings of the optimizer and its schedule, which a checkpoint brings too.
SCHEDULE_SETTINGS = {
    *GROUP_SETTINGS,
    *("adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps", "warmup_ratio"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "max_steps", "num_train_epochs"),
}
# Modules before the first layer. CLIP's `class_embedding` and `pre_layrnorm` are missing on purpose: the original code
# has such a list of names without these two, and so trained them at the full rate.
BEFORE_LAYERS = re.compile(
    r"(?:^|\.)(?:patch_embed(?:dings?)?|pos_embed|position_embeddings?|cls_token|mask_token|register_tokens"
    r"|embed_tokens)(?:\.|$)"
)
# Learned tokens and positions are inputs rather than weights, so decay does not apply to them.
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
    """Split the trainable parameters by tower, layer and weight decay, as stage 2 of the original code does.

    Towers: `vision` is `vision_model` and `visual_projection`, `text` is `text_model` and `text_adapter`, `other` is
    the rest (the logit scale).

    Layers: in a tower of L layers, the embeddings have id 0, layer n (from 0) has n + 1, and everything after the
    layers (final norm, pooling head, projection, adapter) has L + 1. A learning rate is multiplied by
    `layer_decay ** (L + 1 - id)`. As in the original code, CLIP's `class_embedding` and `pre_layrnorm` have L + 1 too.
    Frozen layers count. A layer decay of 1 or more disables it.

    Weight decay applies to parameters with two or more dimensions, except learned tokens and positions.

    Args:
        model: An `LLM2CLIPModel`, possibly in wrappers that prefix its parameter names (DDP, PEFT, compile).
        learning_rate, weight_decay: Values of `other`, and of towers without values of their own.
        vision_layer_decay, text_layer_decay: Factor on the learning rate from each layer to the layer below.

    Returns:
        Groups for a torch optimizer, in the order of the model's parameters, with `params`, `lr` (including the factor
        of the layer), `lr_scale` (that factor), `weight_decay`, `name` (such as `vision/layer3/decay`) and
        `param_names`.

    Raises:
        ValueError: A setting is out of range, no parameter is trainable, or a tower with layer decay has no
            consecutively numbered layers.
    """
    rates = _by_tower("learning rate", vision_learning_rate, text_learning_rate, learning_rate)
    decays = _by_tower("weight decay", vision_weight_decay, text_weight_decay, weight_decay)
    layer_decays = {"vision": vision_layer_decay, "text": text_layer_decay, "other": 1.0}
    groups: dict[str, dict[str, Any]] = {}
    num_layers = _count_layers(model, layer_decays)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower, path = _split(name)
        decayed = parameter.ndim > 1 and not path.endswith(".bias") and NEVER_DECAYED.search(path) is None
        labels, scale = [tower], 1.0
        if tower in num_layers:
            layer = _layer_id(path, tower, num_layers[tower])
            labels.append(f"layer{layer}")
            scale = layer_decays[tower] ** (num_layers[tower] + 1 - layer)
        label = "/".join([*labels, "decay" if decayed else "no_decay"])
        new = {"lr": rates[tower] * scale, "lr_scale": scale, "weight_decay": decays[tower] if decayed else 0.0}
        group = groups.setdefault(label, {"params": [], **new, "name": label, "param_names": []})
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def grouped_optimizer(
    model: nn.Module, args: Any, kind: Any, options: dict[str, Any]
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Give an optimizer the groups of [`parameter_groups`], with the settings of a run.

    Args:
        args: Settings with the fields `GROUP_SETTINGS`.
        kind, options: The optimizer's class and arguments, as `Trainer.get_optimizer_cls_and_kwargs` returns them.

    Raises:
        ValueError: It is no class of optimizers, so that it would make groups of its own.
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ValueError(
            f"optimizer_cls_and_kwargs has {kind!r}, which would make parameter groups of its own, without the rates "
            "of stage 2; give a subclass of torch.optim.Optimizer, or a finished optimizer (optimizers=)."
        )
    groups = parameter_groups(model, **{name: getattr(args, name) for name in GROUP_SETTINGS})
    return kind, {**options, "params": with_low_rank(groups, options.get("params", ()))}


def with_low_rank(groups: list[dict[str, Any]], given: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split parameter groups by what a low-rank optimizer projects (GaLore, APOLLO).

    Args:
        groups: See [`parameter_groups`].
        given: The groups that the Trainer makes for such an optimizer; what they have beside `params` counts.
    """
    settings = {id(x): {k: v for k, v in group.items() if k != "params"} for group in given for x in group["params"]}
    split: list[dict[str, Any]] = []
    for group in groups:
        for is_low in (False, True):
            named = zip(group["params"], group["param_names"], strict=True)
            pairs = [(x, name) for x, name in named if bool(settings.get(id(x))) is is_low]
            if pairs:
                own = {**settings[id(pairs[0][0])], "name": f"{group['name']}/low_rank"} if is_low else {}
                params, names = map(list, zip(*pairs, strict=True))
                split.append({**group, **own, "params": params, "param_names": names})
    return split


def warmup_cosine_schedule(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Make a schedule of linear warm-up and half a cosine to zero, on each group's own initial learning rate.

    Step t (from 0) runs at `(t + 1) / warmup_steps` while t < warmup_steps, then at
    `(1 + cos(pi (t - warmup_steps) / (total_steps - warmup_steps))) / 2`. Without warm-up, step 0 has the full rate.

    Args:
        optimizer: Optimizer, whose groups' `lr` are the peaks.
        warmup_steps, total_steps: Optimizer steps; the total includes the warm-up, and later steps stay at 0.

    Raises:
        ValueError: Unless 0 <= warmup_steps < total_steps.
    """
    check_warmup(warmup_steps, total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / (total_steps - warmup_steps)
        return (1 + math.cos(math.pi * min(progress, 1.0))) / 2

    return LambdaLR(optimizer, factor)


class OptimizerSettings(NamedTuple):
    """The settings that a new optimizer and its schedule were made with.

    A checkpoint brings those of its run; `apply` puts these in their place, with the state of the checkpoint.
    """

    groups: list[dict[str, Any]]
    rates: list[float]

    @classmethod
    def of(cls, optimizer: Any, schedule: Any) -> OptimizerSettings:
        """Read them before a checkpoint is loaded.

        Raises:
            ValueError: New settings cannot take effect with this schedule.
        """
        if not isinstance(schedule, LambdaLR):
            raise ValueError(
                "other settings of the optimizer or its schedule do not take effect in a resumed run with a "
                f"{type(schedule).__name__} schedule; resume with those of the original run."
            )
        groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        return cls(groups, [float(rate) for rate in schedule.base_lrs])

    def apply(self, optimizer: Any, schedule: Any) -> None:
        """Set them after a checkpoint is loaded."""
        schedule.base_lrs = [*self.rates]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [rate * factor for rate, factor in zip(self.rates, factors, strict=True)]
        for group, settings, rate in zip(optimizer.param_groups, self.groups, schedule._last_lr, strict=True):
            group.update(settings)
            group["lr"] = rate


def check_warmup(warmup_steps: int, total_steps: int) -> None:
    """Raise a ValueError unless 0 <= warmup_steps < total_steps."""
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"the warm-up must be shorter than the training, but has {warmup_steps} of {total_steps} optimizer steps; "
            "lower warmup_steps (below 1, it is a share of all steps) or train longer."
        )


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> None:
    """Clamp the log of the logit scale to [0, ln 100], to be called after each optimizer step (CLIP, section 2.5)."""
    model.get_parameter("logit_scale").clamp_(0.0, MAX_LOGIT_SCALE)


class ClampLogitScale(TrainerCallback):
    """Clamps the logit scale to 1 to 100 after every optimizer step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        clamp_logit_scale(model)


def _by_tower(what: str, vision: float | None, text: float | None, other: float) -> dict[str, float]:
    """Return the value of each tower, by default that of `other`."""
    values = {"other": other, "vision": other if vision is None else vision, "text": other if text is None else text}
    for tower, value in values.items():
        if value < 0:
            raise ValueError(f"The {what} of '{tower}' must not be negative, but is {value}.")
    return values


def _split(name: str) -> tuple[str, str]:
    """Return the tower of a parameter and its name from the tower's child on, without the prefixes of wrappers."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part in TOWER_OF_CHILD:
            return TOWER_OF_CHILD[part], ".".join(parts[i:])
    return "other", name


def _layer_numbers(path: str, tower: str) -> list[int]:
    return [int(number) for number in NUMBERED_LAYER.findall(path)] if path.startswith(f"{BACKBONES[tower]}.") else []


def _count_layers(model: nn.Module, layer_decays: dict[str, float]) -> dict[str, int]:
    """Number of layers of each trainable tower with layer decay."""
    trainable = {_split(name)[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter: all have requires_grad=False.")
    for tower, decay in layer_decays.items():
        if decay <= 0:
            raise ValueError(f"{tower}_layer_decay must be above 0 (1 switches it off), but is {decay}.")
    counts: dict[str, int] = {tower: 0 for tower in trainable if layer_decays[tower] < 1}
    for name, _ in model.named_parameters():
        tower, path = _split(name)
        numbers = _layer_numbers(path, tower) if tower in counts else []
        if len(numbers) > 1:
            raise ValueError(
                f"{tower}_layer_decay needs a tower whose layers are numbered in one row, but '{path}' is a layer in "
                f"a stage. Set {tower}_layer_decay=1.0 for this tower."
            )
        for number in numbers:
            counts[tower] = max(counts[tower], number + 1)
    for tower, count in counts.items():
        if count == 0:
            raise ValueError(
                f"{tower}_layer_decay below 1 needs numbered layers (blocks.N, layers.N or layer.N) under "
                f"'{BACKBONES[tower]}', but there are none. Set {tower}_layer_decay=1.0."
            )
    return counts


def _layer_id(path: str, tower: str, num_layers: int) -> int:
    for number in _layer_numbers(path, tower):
        return number + 1
    in_backbone = path.startswith(f"{BACKBONES[tower]}.")
    return 0 if in_backbone and BEFORE_LAYERS.search(path) is not None else num_layers + 1
