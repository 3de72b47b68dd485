"""Heat maps: the similarity between a caption and the patches of an image."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import BaseImageProcessor

from llm2clip.encoders.patches import patch_embeddings
from modeling_llm2clip import LLM2CLIPModel

COLOURS = "coolwarm"
OPACITY = 0.55


def patch_similarity(model: LLM2CLIPModel, pixel_values: Tensor, text_embeds: Tensor) -> Tensor:
    """Compute the cosine similarity between each caption and the patches of its image.

    The patches pass through what was trained on the pooled features; see `patch_embeddings`.

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


def seen_part(image: Image.Image, image_processor: BaseImageProcessor) -> Image.Image:
    """Return the part of an RGB image that a vision tower sees, resized and cropped, in its colours."""
    pixels = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    return Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def draw_heat_map(picture: Image.Image, similarity: Tensor, width: int) -> Image.Image:
    """Draw a heat map `(rows, columns)` over a picture of [`seen_part`] in grey, from blue (lowest) to red (highest).

    The result is `width` pixels wide.
    """
    size = (width, round(width * picture.height / picture.width))
    smooth = F.interpolate(similarity[None, None], size=size[::-1], mode="bicubic")[0, 0]
    low, high = similarity.min(), similarity.max()
    scaled = ((smooth - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).numpy()
    colours = Image.fromarray((255 * colormaps[COLOURS](scaled)[:, :, :3]).astype(np.uint8))
    grey = picture.convert("L").convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return Image.blend(grey, colours, OPACITY)
