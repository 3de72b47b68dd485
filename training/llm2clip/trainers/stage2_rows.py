"""What stage 2 requires of its settings and its model, and the rows of two text encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm2clip.command_line.settings import refuse
from llm2clip.trainers.base_config import require_prefixes
from llm2clip.trainers.lora import trains_lora
from llm2clip.trainers.stage2_config import Stage2Config
from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.modeling_llm2clip_heads import LLM2CLIPTextAdapter

CAPTION_INPUTS = ("input_ids", "attention_mask", "pooling_mask")


def validate_settings(args: Stage2Config, model: LLM2CLIPModel, has_own_loss: bool) -> None:
    """Raise a ValueError if a setting does not fit the model that is trained.

    Args:
        has_own_loss: `compute_loss_func` computes the loss.
    """
    require_prefixes(args.matryoshka_dims, model.config.projection_dim)
    if model.config.text_config.encoders is None:
        refuse(args, ["text_losses"], "the model has one text encoder")
    if not trains_lora(model.text_model):
        names = ["save_format", "neftune_noise_alpha"]
        refuse(args, names, "the model has no LoRA layers (add_lora; in a recipe, lora_rank)")
    has_bias = model.logit_bias is not None
    if not has_own_loss and has_bias != (args.loss == "sigmoid"):
        raise ValueError(
            f"loss is {args.loss}, but the model has {'a' if has_bias else 'no'} logit bias, as for the "
            f"{'sigmoid' if has_bias else 'softmax'} loss; set loss to that."
        )


def with_each_alone(
    inputs: dict[str, Tensor], adapter: LLM2CLIPTextAdapter, widths: Sequence[int], with_both: bool
) -> dict[str, Tensor]:
    """Replace the rows of several text encoders by those of each alone, one after another.

    In place of another's values is the mean that the adapter subtracts, 0 if it does not.

    Args:
        widths: Those of the encoders.
        with_both: Keep the rows of all, in front.
    """
    embeds = inputs["llm_embeds"]
    mean = embeds.new_zeros(embeds.shape[1]) if adapter.center is None else adapter.center.to(embeds)
    encoder = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths)).to(embeds.device)
    alone = [torch.where(encoder == number, embeds, mean) for number in range(len(widths))]
    return {**inputs, "llm_embeds": torch.cat([*([embeds] if with_both else []), *alone])}
