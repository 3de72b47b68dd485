"""Reader of Fashion-MNIST: grey pictures of clothes, in its authors' files, as in Debian's `dataset-fashion-mnist`."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from llm2clip.evaluation.benchmarks.encoded_images import PixelImages
from llm2clip.evaluation.benchmarks.image_folder import labelled
from llm2clip.evaluation.data import ClassificationData

# As its README spells them.
CLASSNAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def read_fashion_mnist(folder: Path, with_train: bool = False) -> ClassificationData:
    """Read the test images and, for a probe, the train images."""
    data = _read_part(folder, "t10k")
    if with_train:
        data.train = _read_part(folder, "train")
    return data


def _read_part(folder: Path, part: str) -> ClassificationData:
    images, labels = (_read_idx(folder / f"{part}-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    return labelled(PixelImages(images), labels.tolist(), CLASSNAMES)


def _read_idx(path: Path) -> np.ndarray:
    """Read an array of unsigned bytes from a packed idx file."""
    content = gzip.decompress(path.read_bytes())
    start = 4 + 4 * content[3]  # of the pixels, after the number of dimensions and each of them
    shape = np.frombuffer(content[4:start], dtype=">u4").tolist()
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
