"""Resize the position embeddings, and the patch kernel, of a pretrained tower to another image or patch size.

The interpolation is that of the original and differs between the families: bicubic without aligned corners for EVA
(also for the patch kernel), bicubic with aligned corners for OpenAI's ViT; both without antialiasing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling_llm2clip.modeling_eva02 import resize_position_embedding


def resize_clip_positions(positions: Tensor, grid: int, class_tokens: int = 1) -> Tensor:
    """Resize absolute positions `(class_tokens + patches, width)` of a square grid to `grid` x `grid` patches."""
    special, patches = positions[:class_tokens], positions[class_tokens:]
    side = round(patches.shape[0] ** 0.5)
    if side == grid:
        return positions
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=True)
    return torch.cat([special, resized[0].flatten(1).t().to(positions.dtype)])


def resize_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """Resize a patch embedding's kernel `(width, channels, patch, patch)`."""
    if kernel.shape[-1] == patch_size:
        return kernel
    size = (patch_size, patch_size)
    return F.interpolate(kernel.float(), size=size, mode="bicubic", align_corners=False).to(kernel.dtype)


def resize_tower(state: Mapping[str, Tensor], image_size: int, patch_size: int) -> dict[str, Tensor]:
    """Resize what depends on the image size in a state dict with the names of this package.

    Args:
        state: Weights of a model, or of its vision tower alone.
        image_size, patch_size: The new height and width in pixels.

    Returns:
        The tensors that have another shape then.

    Raises:
        ValueError: The patch size does not divide the image size.
    """
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of the patch size {patch_size}.")
    grid = image_size // patch_size
    start = "vision_model." if any(name.startswith("vision_model.") for name in state) else ""
    eva, kernel = f"{start}pos_embed", f"{start}patch_embed.proj.weight"
    if eva in state:
        resized = {
            eva: resize_position_embedding(state[eva], (grid, grid)),
            kernel: resize_kernel(state[kernel], patch_size),
        }
    else:
        clip, class_token = f"{start}embeddings.position_embedding.weight", f"{start}embeddings.class_embedding"
        resized = {clip: resize_clip_positions(state[clip], grid, int(class_token in state))}
    return {name: tensor for name, tensor in resized.items() if tensor is not state[name]}
