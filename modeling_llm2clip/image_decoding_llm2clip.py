"""Decode images of any kind to upright RGB, and resize with Pillow: training, evaluation, search and inference."""

from __future__ import annotations

import base64
import importlib
import io
import os
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, UnidentifiedImageError

DEFAULT_MAX_PIXELS = 89_478_485  # Pillow's own limit: a 24-bit image of 256 MiB
DEFAULT_TIMEOUT = 60.0
EXIF_ORIENTATION = 0x0112
# The entries of `Image.info` in which Pillow looks for an orientation.
ORIENTATION_SOURCES = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
# Formats that Pillow gives to Ghostscript, a program that runs them.
PROGRAMS = ("EPS",)
# Endings by which sentence-transformers does not know a picture.
PICTURE_ENDINGS = (".avif", ".heic", ".heif", ".hif", ".jxl")


class SampleError(ValueError):
    """A row that cannot be used.

    Without a reason the key is the whole message, as torch's DataLoader rebuilds an exception of a worker process.
    """

    subject = "row"

    def __init__(self, key: str, reason: str | None = None) -> None:
        super().__init__(key if reason is None else f"The {self.subject} {key!r} cannot be used: {reason}.")
        self.key, self.reason = key, reason

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str | None]]:
        return type(self), (self.key, self.reason)


class DamagedImageError(SampleError):
    """An image that cannot be decoded, is empty, or is too large to decode safely."""

    subject = "image"


class _UnusableError(Exception):
    """A fault that is found here rather than by Pillow."""


def decode_image(
    value: Any, key: str = "image", max_pixels: int = DEFAULT_MAX_PIXELS, timeout: float | None = DEFAULT_TIMEOUT
) -> Image.Image:
    """Decode one image to RGB, upright.

    Conversion to RGB comes before any resizing: resizing a palette or 1-bit image first means nearest-neighbour
    sampling, and an image with alpha would be darkened. Transparent parts are composited on white. 16-bit grey is
    scaled to 8 bits. Of an animation the first frame is used. EXIF orientation is applied.

    Args:
        value: Encoded bytes, a path, a URL (http, https, data, or one that fsspec knows), the
            `{"bytes", "path"}` record of `datasets`, a file opened in binary mode (read only as far as necessary), a
            PIL image, or a uint8 array or tensor with channels first or last, or without channels (grey).
        key: Name of the image in error messages.
        max_pixels: Largest width x height, checked against the file's header before anything is decoded.
        timeout: Seconds to wait for each answer of an http server; None waits indefinitely.

    Returns:
        An image in mode RGB. Decoding it again does not change it.

    Raises:
        DamagedImageError: If the image is missing, unreadable, truncated, empty or too large.
    """
    with decoding_errors(value, key):
        return to_upright_rgb(open_image(value, max_pixels, timeout))


def is_list(value: Any) -> bool:
    """Tell whether a value is several ones: a list, a tuple, or a column of `datasets`; not a text, and not bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def decode_images(images: Any, key: str = "image") -> Any:
    """Decode one image or nested lists of them with [`decode_image`].

    Arrays and tensors stay as they are, except grey pictures of whole numbers, `(height, width)`, which image
    processors do not take.

    Raises:
        DamagedImageError: If an image cannot be decoded; the message names its position.
    """
    if is_list(images):
        return [decode_images(image, f"{key} {index}") for index, image in enumerate(images)]
    is_array = isinstance(images, (np.ndarray, torch.Tensor))
    if images is None or (is_array and (images.ndim != 2 or "float" in str(images.dtype))):
        return images
    return decode_image(images, key)


def require_file(image: Any, captions: str) -> None:
    """Raise FileNotFoundError if an image is a string that is neither a file nor a URL.

    Args:
        captions: Where captions go, for the message: the string may be one.
    """
    if not isinstance(image, (str, os.PathLike)):
        return
    name = os.fspath(image)
    if os.path.isdir(name):
        raise FileNotFoundError(f"{name!r} is a folder; pass the images in it.")
    if not ("://" in name or name.startswith("data:") or os.path.isfile(name)):
        raise FileNotFoundError(f"the file {name!r:.200} does not exist; if it is a caption, pass it to {captions}.")


def refuse_picture(caption: str) -> None:
    """Raise ValueError if a caption is the path of a picture, which sentence-transformers takes for text.

    It knows a path by its ending, and not all endings.
    """
    ending = os.path.splitext(caption)[1].lower()
    # The file first: asked for its endings, Pillow loads all of its formats.
    is_file = ending != "" and os.path.isfile(caption)
    if is_file and (ending in PICTURE_ENDINGS or ending in Image.registered_extensions()):
        raise ValueError(
            f"{caption!r} is a picture, but would be embedded as a caption; pass Image.open({caption!r})."
        )


@contextmanager
def decoding_errors(value: Any, key: str) -> Iterator[None]:
    """Turn every error in this context into a DamagedImageError that names the image."""
    try:
        with warnings.catch_warnings():
            # `open_image` checks the size, against the caller's limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except _UnusableError as error:
        raise DamagedImageError(key, str(error)) from None
    except UnidentifiedImageError as error:
        raise DamagedImageError(key, "Pillow does not recognize its format") from error
    except FileNotFoundError as error:
        raise DamagedImageError(key, f"the file {error.filename or value!r} does not exist") from error
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead to, struct.error and KeyError too
        raise DamagedImageError(key, f"{type(error).__name__}: {error}") from error


def open_image(
    value: Any, max_pixels: int = DEFAULT_MAX_PIXELS, timeout: float | None = DEFAULT_TIMEOUT
) -> Image.Image:
    """Open an image, reading no more than its header, and check its size; inside [`decoding_errors`]."""
    image = _open(value, timeout)
    if image.format in PROGRAMS:
        raise _UnusableError(f"a file of the format {image.format} is a program, which is not run")
    width, height = image.size
    if width < 1 or height < 1:
        raise _UnusableError(f"its size is {width} x {height} pixels")
    if width * height > max_pixels:
        raise _UnusableError(f"its {width} x {height} pixels exceed max_pixels ({max_pixels:,})")
    return image


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image, apply its EXIF orientation and convert it to RGB; inside [`decoding_errors`]."""
    image.load()
    # Not ImageOps.exif_transpose: it rewrites the other tags and fails on images with a malformed one.
    transposition = TRANSPOSITIONS.get(exif_orientation(image))
    if transposition is None:
        return _to_rgb(image)
    rgb = _to_rgb(image.transpose(transposition))
    for source in ORIENTATION_SOURCES:  # otherwise decoding the result again would turn it once more
        rgb.info.pop(source, None)
    return rgb


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image; 1, upright, if it has none that can be read."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # Pillow raises SyntaxError, struct.error and others; the pixels are fine
        return 1


def _open(value: Any, timeout: float | None) -> Image.Image:
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise _UnusableError("it is missing")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return _from_array(value)
    if isinstance(value, io.IOBase):
        return Image.open(value)  # type: ignore[arg-type]
    data = value if isinstance(value, (bytes, bytearray, memoryview)) else _read(os.fspath(value), timeout)
    if len(data) == 0:
        raise _UnusableError("it is empty (zero bytes)")
    return Image.open(io.BytesIO(data))


def _read(name: str, timeout: float | None) -> bytes:
    if name.startswith("data:"):
        return base64.b64decode(name.partition(",")[2])
    if name.startswith(("http://", "https://")):
        # Some servers refuse requests without a user agent of the form name/version.
        request = urllib.request.Request(name, headers={"User-Agent": "llm2clip/0.1"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return bytes(response.read())
    if "://" in name:
        # Not an import statement: transformers would demand fsspec of everyone who loads this code from a Hub repo.
        with importlib.import_module("fsspec").open(name, "rb") as file:
            return bytes(file.read())
    with open(name, "rb") as file:  # read here: Pillow would leave the file open until the image is collected
        return file.read()


def _from_array(array: np.ndarray) -> Image.Image:
    """Make an image of an array with channels first or last; as in transformers, first where both are possible."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    is_grey = array.ndim == 2 and array.dtype in (np.uint16, np.bool_)
    if array.dtype != np.uint8 and not is_grey:
        raise _UnusableError(
            f"an array of {array.dtype} is not an image; pass uint8, or preprocess it into pixel_values"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow's own conversion clips at 255, which turns a 16-bit image white.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise _UnusableError(f"its mode {image.mode} has no defined white point; store 8 or 16 bits per channel")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def with_pillow(image_processor: Any) -> Any:
    """Return an image processor of transformers that resizes with Pillow, as CLIP and the original code do.

    transformers 5 prefers torchvision, whose pixels differ by up to 2 of 255 grey levels. A processor that exists for
    torchvision only, or is not one of transformers, is returned as it is.
    """
    name = type(image_processor).__name__.removesuffix("Fast")
    # The classes of Pillow have a suffix since version 5.
    pillow = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name, None)
    if pillow is None or isinstance(image_processor, pillow):
        return image_processor
    return pillow.from_dict(image_processor.to_dict())
