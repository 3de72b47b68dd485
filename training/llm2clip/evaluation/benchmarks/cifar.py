"""CIFAR-10 and CIFAR-100, from the binary files; those for Python are pickles, which can run code."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.benchmarks.encoded_images import PixelImages
from llm2clip.evaluation.benchmarks.image_folder import labelled
from llm2clip.evaluation.data import ClassificationData
from llm2clip.evaluation.prompts import read_names, template_set

SIDE = 32
PIXELS = 3 * SIDE * SIDE


def read_cifar(
    folder: Path, names: str, label_bytes: int, test: Sequence[str], train: Sequence[str] = ()
) -> ClassificationData:
    """Read rows of labels and of 3,072 pixels: red, green and blue, each line by line.

    Args:
        names: File with a name a line; underscores become blanks, as in OpenAI's prompts.
        label_bytes: Labels before the pixels, of which the last, the finest, counts.
        test, train: Files of rows.
    """
    classnames = [name.replace("_", " ") for name in read_names(folder / names)]
    data = _read_rows([folder / name for name in test], label_bytes, classnames)
    if train:
        data.train = _read_rows([folder / name for name in train], label_bytes, classnames)
    return data


def _read_rows(paths: Sequence[Path], label_bytes: int, classnames: Sequence[str]) -> ClassificationData:
    rows = np.concatenate([np.fromfile(path, dtype=np.uint8).reshape(-1, label_bytes + PIXELS) for path in paths])
    pixels = rows[:, label_bytes:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    data = labelled(PixelImages(pixels), rows[:, label_bytes - 1].tolist(), classnames)
    data.templates = template_set("openai-cifar")
    return data


def _benchmark(classes: int, folder: str, names: str, label_bytes: int, test: str, train: Sequence[str]) -> Benchmark:
    read = partial(read_cifar, names=names, label_bytes=label_bytes, test=[test])
    return Benchmark(
        name=f"cifar{classes}", title=f"CIFAR-{classes}", groups=("classification",), folder=folder,
        needs=(test, names),
        files=f"{folder}/{test} and {names}, {', '.join(train)} for probes: the binary version, not that for Python.",
        counts={"images": 10000, "classes": classes}, license="not stated",
        source="www.cs.toronto.edu/~kriz/cifar.html, the binary version", read=read,
        protocol="zero-shot-classification",
        note="OpenAI's 18 templates. CLIP_benchmark leaves the underscores in the names of CIFAR-100.",
        read_train=partial(read, train=train), train_needs=tuple(train),
    )  # fmt: skip


TRAIN = [f"data_batch_{number}.bin" for number in range(1, 6)]
BENCHMARKS = [
    _benchmark(10, "cifar-10-batches-bin", "batches.meta.txt", 1, "test_batch.bin", TRAIN),
    _benchmark(100, "cifar-100-binary", "fine_label_names.txt", 2, "test.bin", ["train.bin"]),
]
