"""What stage 2 freezes of a model, and the other settings of a model that is trained."""

from __future__ import annotations

import itertools
from typing import cast

from torch import nn

from llm2clip.trainers.alignment import freeze_maps
from llm2clip.trainers.stage2_config import Stage2Config
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel

# The pooled output of these towers does not depend on their mask token, for whose gradient DDP would wait. For other
# towers it has to look for such parameters in every step, which is the Trainer's default.
WITH_UNUSED_MASK_TOKEN = ("dinov2", "dinov2_with_registers", "dinov3_vit")


def prepare_joint_model(model: LLM2CLIPModel, args: Stage2Config) -> None:
    """Do to a model what the settings say, before it is trained: dropout, and what is frozen beside a frozen LLM.

    An LLM trains if it has LoRA layers, see [`add_lora`](llm2clip.trainers.lora.add_lora). The maps of a closed form
    stay, and what is trained on top of them follows from the model.

    Raises:
        ValueError: The tower has no patch dropout, or fewer layers.
    """
    tower, config = model.vision_model, cast(LLM2CLIPConfig, model.config)
    if args.feature_dropout is not None:
        config.feature_dropout = args.feature_dropout
    if args.patch_dropout is not None:
        if not hasattr(tower.config, "patch_dropout"):
            raise ValueError(f"patch_dropout is for EVA02 towers; {type(tower).__name__} has none. Leave it unset.")
        tower.config.patch_dropout = config.vision_config.patch_dropout = args.patch_dropout
    freeze_unused(tower)
    if model.text_model is not None and not model.text_model.has_adapter:
        model.text_model.requires_grad_(False)
    if args.freeze_vision == "all":
        tower.requires_grad_(False)
    if config.text_head == "residual":
        freeze_maps(model)
    if args.freeze_vision_layers:
        freeze_layers(tower, args.freeze_vision_layers)


def freeze_layers(tower: nn.Module, count: int) -> None:
    """Freeze the lower transformer layers of a tower and everything before them; `-n` leaves the last `n` trainable.

    Raises:
        ValueError: The tower has no layers, or fewer.
    """
    stacks = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    layers = max(stacks, key=len, default=nn.ModuleList())
    frozen = count if count >= 0 else len(layers) + count
    if not 0 < frozen <= len(layers):
        raise ValueError(f"freeze_vision_layers is {count}, but the tower has {len(layers)} layers.")
    of_layers = set(layers.parameters())
    # Towers register the embeddings before their layers.
    below = itertools.takewhile(lambda parameter: parameter not in of_layers, tower.parameters())
    for parameter in itertools.chain(below, layers[:frozen].parameters()):
        parameter.requires_grad_(False)


def freeze_unused(tower: nn.Module) -> None:
    """Freeze the parameters of a vision tower that its pooled output does not depend on."""
    if getattr(getattr(tower, "config", None), "model_type", "") in WITH_UNUSED_MASK_TOKEN:
        tower.get_parameter("embeddings.mask_token").requires_grad_(False)
