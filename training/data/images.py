"""From stored bytes to pixel values: safe decoding, and the training and evaluation transforms."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F
from transformers import BaseImageProcessor

from .records import DamagedImageError

DEFAULT_MAX_PIXELS = 89_478_485  # Pillow's own limit: a 24-bit image of 256 MiB
EXIF_ORIENTATION = 0x0112
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


def decode_image(value: Any, key: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode one image to RGB, upright.

    Conversion to RGB comes before any resizing: resizing a palette or 1-bit image first means nearest-neighbour
    sampling, and an image with alpha would be darkened. Transparent parts are composited on white. 16-bit grey is
    scaled to 8 bits. Of an animation the first frame is taken. EXIF orientation is applied.

    Args:
        value: Encoded bytes, a path or fsspec URL, the `{"bytes", "path"}` record of `datasets`, a PIL image, or a
            file that is open for reading bytes, of which no more is read than the image needs.
        key: The row's key, for the error.
        max_pixels: Largest width x height, judged by the file's header before anything is decoded.

    Returns:
        An image in mode RGB.

    Raises:
        DamagedImageError: If the image is missing, unreadable, truncated, empty or too large.
    """
    try:
        with warnings.catch_warnings():
            # The size is checked here, against the caller's limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = value if isinstance(value, Image.Image) else Image.open(_file(value))
            width, height = image.size
            if width < 1 or height < 1:
                raise _UnusableError(f"it is {width} x {height} pixels large")
            if width * height > max_pixels:
                raise _UnusableError(
                    f"its {width} x {height} pixels are more than the {max_pixels:,} that max_pixels allows"
                )
            image.load()
            return _to_rgb(_upright(image))
    except _UnusableError as error:
        raise DamagedImageError(key, str(error)) from None
    except UnidentifiedImageError as error:
        raise DamagedImageError(key, "its bytes are in no image format that Pillow knows") from error
    except FileNotFoundError as error:
        raise DamagedImageError(key, f"there is no file {error.filename or value!r}") from error
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead to, struct.error and KeyError too
        raise DamagedImageError(key, f"{type(error).__name__}: {error}") from error


class _UnusableError(Exception):
    """A fault that is found here rather than by Pillow."""


def _file(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise _UnusableError("it is missing")
    if isinstance(value, io.IOBase):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        if len(value) == 0:
            raise _UnusableError("it has zero bytes")
        return io.BytesIO(value)
    path = os.fspath(value)
    if "://" in path:
        import fsspec

        with fsspec.open(path, "rb") as file:
            return io.BytesIO(file.read())
    with open(path, "rb") as file:  # read here: Pillow would leave the file open until the image is collected
        return io.BytesIO(file.read())


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes the other tags anew and fails on images whose maker got one wrong.
    transposition = TRANSPOSITIONS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    return image if transposition is None else image.transpose(transposition)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow's own conversion clips at 255, which turns a 16-bit image white.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise _UnusableError(f"its mode {image.mode} has no defined white point; store 8 or 16 bits per channel")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        background = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, layer).convert("RGB")
    return image.convert("RGB")


class EvalTransform:
    """The image processor itself: `transform(image)` is a (3, H, W) float tensor.

    Args:
        image_processor: A transformers image processor.
    """

    def __init__(self, image_processor: BaseImageProcessor) -> None:
        self.image_processor = image_processor

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Prepare an RGB image; returns (3, H, W) float32."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]


class TrainTransform:
    """A random crop of an image, resized and normalised as the image processor does.

    The original recipe: RandomResizedCrop with a scale of 0.9 to 1, ratio 3/4 to 4/3, bicubic, no flip.

    Args:
        image_processor: A transformers image processor, which gives output size, mean and standard deviation.
        scale: Smallest and largest share of the image's area that a crop keeps.
        ratio: Smallest and largest aspect ratio of a crop.

    Raises:
        ValueError: If the scale is not within (0, 1], or the processor's output has no fixed size.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"The crop scale must be two ascending numbers within (0, 1], not {tuple(scale)}.")
        self.scale = list(scale)
        self.ratio = list(ratio)
        self.size = output_size(image_processor)
        settings = image_processor.to_dict()
        self.factor = settings["rescale_factor"] if settings.get("do_rescale", True) else 1.0
        normalise = settings.get("do_normalize", True)
        self.mean = list(settings["image_mean"]) if normalise else [0.0] * 3
        self.std = list(settings["image_std"]) if normalise else [1.0] * 3

    def __call__(self, image: Image.Image, seed: int) -> torch.Tensor:
        """Crop and normalise an RGB image.

        Args:
            image: The image.
            seed: Decides the crop, alone: no global random state is read or advanced.

        Returns:
            (3, H, W) float32.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            top, left, height, width = RandomResizedCrop.get_params(image, self.scale, self.ratio)
        crop = F.resized_crop(image, top, left, height, width, list(self.size), InterpolationMode.BICUBIC)
        pixels = F.pil_to_tensor(crop).float() * self.factor
        return F.normalize(pixels, self.mean, self.std)


def output_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of what an image processor returns.

    Raises:
        ValueError: If they depend on the image.
    """
    settings = image_processor.to_dict()
    size = dict(settings["crop_size"]) if settings.get("do_center_crop") else dict(settings["size"])
    if {"height", "width"} <= set(size):
        return size["height"], size["width"]
    raise ValueError(
        f"{type(image_processor).__name__} resizes to {size} without cropping, so that its output has no fixed size; "
        "set do_center_crop and crop_size."
    )
