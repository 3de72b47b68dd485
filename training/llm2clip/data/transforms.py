"""Image transforms for training and evaluation: the saved image processor, and the crop of training.

There are two backends. `exact` decodes with Pillow and resizes as the image processor does. Every image processor that
this package writes or loads resizes with Pillow (`with_pillow`), bicubic and antialiased, as the original code does.
`fast` decodes JPEGs to tensors and resizes tensors, which differs from Pillow by one or two of 255 grey levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F
from transformers import BaseImageProcessor, CLIPImageProcessor, CLIPImageProcessorPil

from modeling_llm2clip.image_decoding_llm2clip import (
    DEFAULT_MAX_PIXELS,
    DamagedImageError,
    decode_image,
    decoding_errors,
    exif_orientation,
    open_image,
    to_upright_rgb,
)

# Largest resized image before cropping: 96 MiB. At a shorter side of 224, this allows aspect ratios up to 660.
MAX_RESIZED_PIXELS = 2**25
ImageBackend = Literal["exact", "fast"]
# Called with a value, its key and, if it is not the default, `max_pixels`.
Decoder = Callable[..., Any]


def decode_tensor(value: Any, key: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> torch.Tensor:
    """Decode one image to an upright RGB tensor; like `decode_image`, but JPEGs are decoded without Pillow.

    Returns:
        uint8 `(3, H, W)` in channels-last memory format.
    """
    with decoding_errors(value, key):
        image = open_image(value, max_pixels)
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        file = getattr(image, "fp", None)
        if plain and file is not None and exif_orientation(image) == 1:
            file.seek(0)
            data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
            return cast(torch.Tensor, decode_jpeg(data, mode=ImageReadMode.RGB))
        return _as_tensor(to_upright_rgb(image))


class EvalTransform:
    """Decodes an image and prepares it with an image processor, as in evaluation.

    Args:
        backend: `exact` decodes with Pillow, and resizes with the library that the image processor uses; `fast`
            decodes to tensors, and resizes these with torchvision by the settings of the image processor.

    Raises:
        ValueError: If the backend is unknown, or is `fast` and the image processor is not a CLIPImageProcessor.
    """

    def __init__(self, image_processor: BaseImageProcessor, backend: ImageBackend = "exact") -> None:
        if backend not in get_args(ImageBackend):
            raise ValueError(f"backend must be one of {', '.join(get_args(ImageBackend))}, not {backend!r}.")
        self.image_processor, self.backend = image_processor, backend
        # Decodes an image with the backend, given its value, its key and `max_pixels`.
        self.decode: Decoder = decode_tensor if backend == "fast" else decode_image
        self._called: Any = image_processor
        settings = image_processor.to_dict()
        if backend == "fast":
            if type(image_processor) not in (CLIPImageProcessor, CLIPImageProcessorPil):
                raise ValueError(
                    "image_backend fast needs a CLIPImageProcessor, but the image processor is a "
                    f"{type(image_processor).__name__}; use exact."
                )
            self._called = CLIPImageProcessor.from_dict(settings)
        size = {side: length for side, length in dict(settings.get("size") or {}).items() if length is not None}
        self._shortest_edge = size.get("shortest_edge") if settings.get("do_resize") and len(size) == 1 else None

    def __call__(self, image: Image.Image | torch.Tensor, key: str = "image") -> torch.Tensor:
        """Prepare an RGB image, as returned by `decode`, of the row `key`; returns (3, H, W) float32.

        Raises:
            DamagedImageError: If it is so long and narrow that it is too large after resizing its shorter side.
        """
        return self.inputs(image, key)["pixel_values"]

    def inputs(self, image: Image.Image | torch.Tensor, key: str = "image") -> dict[str, torch.Tensor]:
        """Prepare all inputs of a model of an RGB image; see [`EvalTransform.__call__`].

        Towers for images of any size and shape (SigLIP 2 NaFlex) need more than the pixels.
        """
        self._refuse_narrow(image, key)
        layout = {"input_data_format": "channels_first"} if isinstance(image, torch.Tensor) else {}
        return {name: value[0] for name, value in self._called(image, return_tensors="pt", **layout).items()}

    def _refuse_narrow(self, image: Image.Image | torch.Tensor, key: str) -> None:
        if self._shortest_edge is None:
            return
        height, width = F.get_size(image)
        short, long = self._shortest_edge, int(self._shortest_edge * max(height, width) / min(height, width))
        if short * long > MAX_RESIZED_PIXELS:
            raise DamagedImageError(
                key, f"its {width} x {height} pixels are too narrow: resized, they would be {short} x {long}; cut it"
            )


class TrainTransform:
    """Crops an image at random, and resizes and normalizes it as an image processor does.

    The defaults are those of the original: RandomResizedCrop, scale 0.9 to 1, ratio 3/4 to 4/3, bicubic, no flip.

    Args:
        image_processor: A transformers image processor that defines output size, mean and standard deviation.
        scale: Smallest and largest area of a crop, as a fraction of the image.
        ratio: Smallest and largest aspect ratio of a crop.

    Raises:
        ValueError: If the scale is not within (0, 1], or the output of the processor has no fixed size.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"The crop scale must be two ascending numbers in (0, 1], not {tuple(scale)}.")
        self.scale, self.ratio = list(scale), list(ratio)
        self.size = output_size(image_processor)
        self.gain, self.offset = gain_and_offset(image_processor.to_dict())

    def __call__(self, image: Image.Image | torch.Tensor, seed: int) -> torch.Tensor:
        """Crop and normalize an RGB image.

        Args:
            image: The image, or a uint8 tensor `(3, H, W)`, which is resized as a tensor.
            seed: Determines the crop; the global random state is neither read nor advanced.

        Returns:
            (3, H, W) float32.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            box = RandomResizedCrop.get_params(image, self.scale, self.ratio)
        crop = F.resized_crop(image, *box, list(self.size), InterpolationMode.BICUBIC)
        pixels = _as_tensor(crop).to(torch.float32, memory_format=torch.contiguous_format)
        return torch.addcmul(self.offset, pixels, self.gain)


def gain_and_offset(settings: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what pixels are multiplied by and what is added to rescale and normalize them, (3, 1, 1) each."""
    mean, std = torch.zeros(3), torch.ones(3)
    if settings.get("do_normalize", True):
        mean, std = torch.tensor(settings["image_mean"]), torch.tensor(settings["image_std"])
    factor = settings["rescale_factor"] if settings.get("do_rescale", True) else 1.0
    return (factor / std)[:, None, None], (-mean / std)[:, None, None]


def _as_tensor(image: Image.Image | torch.Tensor) -> torch.Tensor:
    return image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1)


def output_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Return the height and width of an image processor's output.

    Raises:
        ValueError: If they depend on the image.
    """
    settings = image_processor.to_dict()
    size = dict(settings["crop_size" if settings.get("do_center_crop") else "size"])
    if {"height", "width"} <= set(size):
        return size["height"], size["width"]
    raise ValueError(
        f"{type(image_processor).__name__} resizes to {size} without cropping, so its output has no fixed size; "
        "set do_center_crop and crop_size."
    )
