"""A checksum of what a reader returned, so that results on different data are not taken for the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llm2clip.encoders.images import ImageList
from llm2clip.evaluation.benchmarks.encoded_images import EncodedImages

# Bytes of each image that are read: its header, with its size and encoder.
HEAD = 4096


def data_checksum(data: Any) -> str:
    """Identify the data of a benchmark: texts, labels, pairs and their order, and the images.

    Of an image count its file name, its size in bytes and its first 4 KiB, which is quick for large sets too; its
    folder does not count.

    Args:
        data: What a reader returned: a dataclass, or a mapping of them.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    _add(digest, data)
    return digest.hexdigest()[:16]


def _add(digest: Any, value: Any) -> None:
    """Hash a value after its type and size, so that two lists of texts with other borders differ."""
    if isinstance(value, ImageList):
        if isinstance(value.images, EncodedImages):
            for row in range(len(value.images)):
                _add(digest, value.key(row))
                _add(digest, value.images.head(row, HEAD))
            return
        for row, image in enumerate(value.images):
            _add_image(digest, image, value.key(row))
    elif hasattr(value, "content_keys"):
        digest.update(value.content_keys().tobytes())
    elif isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, (str, bytes)):
        content = value.encode() if isinstance(value, str) else value
        digest.update(f"{type(value).__name__} {len(content)}\n".encode() + content)
    elif isinstance(value, Path):
        _add_image(digest, value, value.name)
    elif isinstance(value, Mapping):
        for key in value:
            _add(digest, str(key))
            _add(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)}\n".encode())
        for item in value:
            _add(digest, item)
    elif hasattr(value, "__dict__") and not callable(value):
        _add(digest, vars(value))
    else:
        digest.update(f"{value!r}\n".encode())


def _add_image(digest: Any, image: Any, key: str) -> None:
    if not isinstance(image, Path):
        _add(digest, key)
        _add(digest, image)
    elif image.is_file():
        with image.open("rb") as file:
            head = file.read(HEAD)
        digest.update(f"file {image.name} {image.stat().st_size} {len(head)}\n".encode() + head)
    else:
        digest.update(f"no file {image.name}\n".encode())
