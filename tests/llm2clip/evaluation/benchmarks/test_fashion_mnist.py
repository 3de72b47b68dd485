"""Fashion-MNIST in its idx files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks
from modeling_llm2clip.image_decoding_llm2clip import decode_image
from tests.llm2clip.evaluation.benchmarks.samples import read


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def write_part(folder: Path, part: str, labels: list[int], packed: bool = True) -> None:
    images = np.arange(len(labels) * 6, dtype=np.uint8).reshape(-1, 2, 3)
    folder.mkdir(exist_ok=True)
    for name, array in (("images-idx3", images), ("labels-idx1", np.array(labels, dtype=np.uint8))):
        path = folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))


@pytest.mark.parametrize("packed", [True, False])
def test_images_and_labels_are_read_with_or_without_gz(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "fashion-mnist"
    write_part(folder, "t10k", [9, 0], packed)
    data = read("fashion-mnist", tmp_path)
    assert data.labels.tolist() == [9, 0]
    image = data.images.decode(1, decode_image)
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert image.getpixel((1, 1)) == (10, 10, 10)
    names = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
    assert data.classnames == names.split(", "), "the order of its README"
    assert len(data.templates) == 80
    write_part(folder, "train", [1, 2, 3], packed)
    assert read("fashion-mnist-probe-sgd", tmp_path).train.labels.tolist() == [1, 2, 3]


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    write_part(tmp_path, "t10k", [1, 2])
    read_files = all_benchmarks()["fashion-mnist"].read
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    zeros = idx(np.zeros(3, dtype=np.uint8))
    for content, message in (
        (whole[:-6], r"labels-idx1-ubyte\.gz is damaged"),
        (gzip.compress(zeros), r"t10k has images \(2, 2, 3\), but labels \(3,\)"),
        (gzip.compress(zeros[:-1]), r"has 2 bytes for an array \(3,\)"),
        (gzip.compress(zeros + b"0"), r"has 4 bytes for an array \(3,\)"),
        (gzip.compress(b"\x00\x00\x0d\x01"), "is not an idx file of unsigned bytes"),
    ):
        labels.write_bytes(content)
        with pytest.raises(BenchmarkError, match=message):
            read_files(tmp_path)
    labels.unlink()
    with pytest.raises(BenchmarkError, match=r"there is no file .*labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz"):
        read_files(tmp_path)
