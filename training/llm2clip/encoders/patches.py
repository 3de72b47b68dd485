"""Embeddings of the patches of an image in the space that images and texts share.

MaskCLIP (arXiv 2112.01071) takes them from the values of the last attention layer: in its place, `out_proj(v_proj(x))`
of the patch itself. Residual, feed-forward layer, final norm and projection stay. That is attention of a token to
itself alone, as which it is computed here, so that whatever a tower does to its values (the `inner_attn_ln` of EVA02,
a layer scale, LoRA) is part of it, and what it does to queries and keys (rotary positions) is not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.modeling_llm2clip_utils import execution_device
from modeling_llm2clip.modeling_llm2clip_vision import ATTENTION_ROWS, patch_tokens, pool_alone

# Vision towers of transformers, with the names of their layers and of the attention in each.
CLIP_LAYERS = ("encoder.layers", "self_attn")
DINO_LAYERS = ("encoder.layer", "attention")
LAYERS = {
    "eva02_vision_model": ("blocks", "attn"),
    "clip_vision_model": CLIP_LAYERS,
    "siglip_vision_model": CLIP_LAYERS,
    "siglip2_vision_model": CLIP_LAYERS,
    "altclip_vision_model": CLIP_LAYERS,
    "chinese_clip_vision_model": CLIP_LAYERS,
    "clipseg_vision_model": CLIP_LAYERS,
    "metaclip_2_vision_model": CLIP_LAYERS,
    "dinov2": DINO_LAYERS,
    "dinov2_with_registers": DINO_LAYERS,
}


@torch.no_grad()
def patch_embeddings(model: nn.Module, pixel_values: Tensor, values_only: bool = False) -> Tensor:
    """Embed the patches of images in the shared space, as the model embeds whole images.

    A patch passes through all that follows the tower's layers: norm, standardisation and head of our models, the
    attention pooling of SigLIP (with the patch as its only token), projection.

    Args:
        model: A joint model or vision half of this package, or a CLIP or SigLIP model of transformers.
        pixel_values: `(images, 3, height, width)` of any size, normalised. Zeros at the bottom and at the right
            complete the last patches, and the table of positions is interpolated.
        values_only: Take the values of the last attention layer, as MaskCLIP; otherwise its output.

    Returns:
        Unit vectors, float32 `(images, rows, columns, width)` on the device of the model.

    Raises:
        ValueError: The tower has no fixed grid of patches, or, with `values_only`, is none of those whose last
            attention layer is known.
    """
    tower = _tower(model)
    height, width = _patch_size(tower)
    pixel_values = F.pad(pixel_values, (0, -pixel_values.shape[-1] % width, 0, -pixel_values.shape[-2] % height))
    grid = (pixel_values.shape[-2] // height, pixel_values.shape[-1] // width)
    pixel_values = pixel_values.to(execution_device(tower), next(tower.parameters()).dtype)
    with ExitStack() as stack:
        if values_only:
            stack.enter_context(_to_themselves(_last_attention(tower), grid[0] * grid[1]))
        patches = _project_patches(model, tower, pixel_values, grid)
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{type(tower).__name__} makes {patches.shape[1]} patches of images of {grid[0]} x {grid[1]} patches: it "
            "has no fixed grid of patches, which segmentation and heat maps need."
        )
    return F.normalize(patches.float(), dim=-1).unflatten(1, grid)


def patch_similarity(model: LLM2CLIPModel, pixel_values: Tensor, text_embeds: Tensor) -> Tensor:
    """Compute the cosine similarity between each caption and the patches of its image.

    The patches pass through what was trained on the pooled features; see [`patch_embeddings`].

    Args:
        model: The model; its LLM is not used.
        pixel_values: `(batch, 3, height, width)`.
        text_embeds: `(batch, projection_dim)`, unit length.

    Returns:
        `(batch, rows, columns)` float32 on the CPU.

    Raises:
        ValueError: The vision tower has no fixed grid of patches.
    """
    patches = patch_embeddings(model, pixel_values)
    return torch.einsum("irce,ie->irc", patches, text_embeds.to(patches)).cpu()


def _tower(model: nn.Module) -> Any:
    tower = getattr(model, "vision_model", None)
    if tower is None:
        raise ValueError(
            f"{type(model).__name__} has no vision tower whose patches are known, as LLM2CLIP models and those of "
            "transformers have."
        )
    return tower


def _patch_size(tower: Any) -> tuple[int, int]:
    size = getattr(tower.config, "patch_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2:
        raise ValueError(f"{type(tower).__name__} has no fixed patch size, which segmentation and heat maps need.")
    return sides


def _last_attention(tower: Any) -> nn.Module:
    model_type = tower.config.model_type
    if model_type not in LAYERS:
        raise ValueError(
            f"MaskCLIP's patch embeddings are not known for a {model_type} tower, but for {', '.join(LAYERS)}."
        )
    layers, attention = LAYERS[model_type]
    # Towers of CLIP and SigLIP nest their modules before transformers 5.6.
    return getattr(getattr(tower, "vision_model", tower).get_submodule(layers)[-1], attention)


@contextmanager
def _to_themselves(attention: nn.Module, patches: int) -> Iterator[None]:
    """Let the last tokens of an attention layer, which are the patches, attend to themselves alone.

    The tokens before them, class token and registers, attend to all tokens as ever.
    """

    def replace(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        states: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        attended: Tensor = output[0] if isinstance(output, tuple) else output

        def alone(value: Any, part: Tensor) -> Any:
            # A layer may get its states as query, key and value; other tensors are positions and masks of the tokens.
            is_states = isinstance(value, Tensor) and value.shape == states.shape
            return part if is_states else None if isinstance(value, Tensor) else value

        patch_values = []
        for part in states[:, -patches:].flatten(0, 1)[:, None].split(ATTENTION_ROWS):
            options = {name: alone(value, part) for name, value in kwargs.items()}
            values = module.forward(*(alone(value, part) for value in args), **options)
            patch_values.append((values[0] if isinstance(values, tuple) else values)[:, 0])
        own_values = torch.cat(patch_values).unflatten(0, (len(states), patches))
        mixed = torch.cat([attended[:, :-patches], own_values], dim=1)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    handle = attention.register_forward_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _project_patches(model: Any, tower: Any, pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Project the patches of a model of this package or of a CLIP-like model of transformers."""
    size, options = getattr(tower.config, "image_size", None), dict[str, Any]()
    parameters = inspect.signature(tower.forward).parameters
    if "spatial_shapes" in parameters:
        pixel_values, options = _patch_lists(pixel_values, grid)
    elif "interpolate_pos_encoding" in parameters and tuple(pixel_values.shape[-2:]) != (size, size):
        options["interpolate_pos_encoding"] = True
    if hasattr(model, "get_patch_features"):
        return model.get_patch_features(pixel_values, **options)
    patches = patch_tokens(tower, tower(pixel_values=pixel_values, **options), pixel_values)
    projection = getattr(model, "visual_projection", None)
    patches = pool_alone(tower, patches)
    return patches if projection is None else projection(patches)


def _patch_lists(pixel_values: Tensor, grid: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Cut images into the lists of patches that NaFlex towers (SigLIP 2) read, with a mask that hides none."""
    patches = pixel_values.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1)).permute(0, 2, 4, 3, 5, 1)
    patches = patches.flatten(3).flatten(1, 2)
    shapes = torch.tensor([grid] * len(patches), device=patches.device)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device)
    return patches, {"pixel_attention_mask": mask, "spatial_shapes": shapes}
