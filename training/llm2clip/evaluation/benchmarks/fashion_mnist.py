"""Fashion-MNIST: grey pictures of clothes, from its authors' files or Debian's `dataset-fashion-mnist`."""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path

import numpy as np

from llm2clip.evaluation.benchmark import Benchmark
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
    images, labels = (_read_idx(folder / f"{part}-{name}-ubyte") for name in ("images-idx3", "labels-idx1"))
    return labelled(PixelImages(images), labels.tolist(), CLASSNAMES)


def _read_idx(path: Path) -> np.ndarray:
    """Read an array of unsigned bytes from an idx file, or from the same file with the suffix `.gz`."""
    packed = path.with_name(f"{path.name}.gz")
    content = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    start = 4 + 4 * content[3]  # of the pixels, after the number of dimensions and each of them
    shape = np.frombuffer(content[4:start], dtype=">u4").tolist()
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


BENCHMARKS = [
    Benchmark(
        name="fashion-mnist", title="Fashion-MNIST", groups=("classification",), folder="fashion-mnist",
        needs=("t10k-images-idx3-ubyte*",),
        files="t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz, train-* for probes; with or without .gz.",
        counts={"images": 10000, "classes": 10}, license="MIT",
        source="github.com/zalandoresearch/fashion-mnist; Debian's dataset-fashion-mnist: /usr/share/datasets",
        read=read_fashion_mnist, protocol="zero-shot-classification",
        note="OpenAI has no templates for it: the 80 of ImageNet, as CLIP_benchmark.",
        read_train=partial(read_fashion_mnist, with_train=True),
    ),
]  # fmt: skip
