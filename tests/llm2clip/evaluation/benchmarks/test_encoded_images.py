"""Images of archives and arrays, made when they are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llm2clip.evaluation.benchmarks.checksum import HEAD, data_checksum
from llm2clip.evaluation.benchmarks.encoded_images import ArchivedImages, FilePart, PixelImages
from llm2clip.evaluation.data import BenchmarkImages, ClassificationData
from modeling_llm2clip.image_decoding_llm2clip import decode_image


def data_of(images: BenchmarkImages) -> ClassificationData:
    return ClassificationData(images, torch.zeros(len(images), dtype=torch.int64), ["a"])


def test_pixels_are_decoded_as_they_are() -> None:
    """Not square, so that width and height cannot be exchanged; the last row by a negative number."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
    images = PixelImages(pixels.transpose(0, 2, 1, 3))
    assert np.array_equal(np.asarray(decode_image(images[-1])), pixels[3].transpose(1, 0, 2))
    assert np.array_equal(
        np.asarray(decode_image(PixelImages(pixels[..., 0])[1])), np.stack([pixels[1, ..., 0]] * 3, -1)
    )
    assert (len(images), len(list(images))) == (4, 4)
    with pytest.raises(IndexError):
        images[4]


def test_the_checksum_reads_the_head_of_an_archived_image_and_not_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"

    def checksum(content: bytes) -> str:
        path.write_bytes(content)
        return data_checksum(data_of(BenchmarkImages(ArchivedImages([FilePart(path, 1, len(content) - 1)]), ["x"])))

    content = bytes(2 * HEAD)
    expected = checksum(content)
    assert checksum(content[:-1] + b"1") == expected
    assert checksum(content + b"0") != expected
    assert checksum(b"1" + content[1:]) == expected
    assert checksum(b"11" + content[2:]) != expected
