"""Heat maps: pictures of the similarity between a caption and the patches of an image."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import BaseImageProcessor

COLOURS = "coolwarm"
OPACITY = 0.55


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
