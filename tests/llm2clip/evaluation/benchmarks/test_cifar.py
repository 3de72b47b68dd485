"""CIFAR in its binary form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks, choose_benchmarks
from llm2clip.evaluation.prompts import template_set
from modeling_llm2clip.image_decoding_llm2clip import decode_image
from tests.llm2clip.evaluation.benchmarks.samples import read


def row(labels: list[int], shade: int) -> bytes:
    """A picture whose red is `shade` but 7 in its second line, whose green is 2 and whose blue is 3."""
    red = np.full((32, 32), shade, dtype=np.uint8)
    red[1] = 7
    return bytes(labels) + red.tobytes() + bytes([2]) * 1024 + bytes([3]) * 1024


def test_cifar10(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    (folder / "test_batch.bin").write_bytes(row([2], 10) + row([0], 20))
    data = read("cifar10", tmp_path)
    assert data.classnames == ["airplane", "automobile", "bird"]
    assert data.labels.tolist() == [2, 0]
    image = data.images.decode(1, decode_image)
    assert image.size == (32, 32)
    assert image.getpixel((5, 0)) == (20, 2, 3)
    assert image.getpixel((5, 1)) == (7, 2, 3)
    assert image.getpixel((1, 5)) == (20, 2, 3)
    assert data.templates == template_set("openai-cifar")
    (probe,) = choose_benchmarks(["cifar10-probe-sgd"], tmp_path)
    assert probe.find(tmp_path) is None
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(row([number % 3], number))
    assert read("cifar10-probe-sgd", tmp_path).train.labels.tolist() == [1, 2, 0, 1, 2]
    for content, message in ((row([2], 10)[:-1], "has 3,072 bytes, no multiple of 3,073"), (b"", "has 0 bytes")):
        (folder / "test_batch.bin").write_bytes(content)
        with pytest.raises(BenchmarkError, match=message):
            read("cifar10", tmp_path)


def test_fine_labels_of_cifar100_and_names_with_blanks(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "fine_label_names.txt").write_text("apple\naquarium_fish\n")
    (folder / "test.bin").write_bytes(row([9, 1], 10) + row([8, 0], 20))
    data = read("cifar100", tmp_path)
    assert data.classnames == ["apple", "aquarium fish"]
    assert data.labels.tolist() == [1, 0]
    assert data.images.decode(0, decode_image).getpixel((0, 0)) == (10, 2, 3)


def test_pickles_are_not_taken_for_the_set(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(b"\x80\x04.")
    benchmark = all_benchmarks()["cifar10"]
    assert benchmark.find(tmp_path) is None
    assert benchmark.find(folder) is None
    assert "binary version" in benchmark.files
