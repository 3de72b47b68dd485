"""Images of archives and arrays, made when they are asked for."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2clip.evaluation.benchmarks.checksum import HEAD, data_checksum
from llm2clip.evaluation.benchmarks.encoded_images import ArchivedImages, CroppedFiles, FilePart, PixelImages
from llm2clip.evaluation.data import BenchmarkImages, ClassificationData
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError, decode_image
from tests.llm2clip.evaluation.benchmarks.pictures import picture, write_picture


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


def test_images_are_sent_to_worker_processes_and_have_keys_by_their_content(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"--" + picture(3))
    images = BenchmarkImages(ArchivedImages([FilePart(path, 2, len(picture(3)))]), ["name"])
    again = pickle.loads(pickle.dumps(images))
    assert again.decode(0, decode_image).getpixel((0, 0)) == (3, 0, 252)
    assert np.array_equal(images.content_keys(), BenchmarkImages([picture(3)]).content_keys())


def test_a_damaged_file_of_a_cropped_set_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(picture(1)[:40])
    with pytest.raises(DamagedImageError, match=r"broken\.png"):
        BenchmarkImages(CroppedFiles([path], 2), ["x"]).decode(0, decode_image)


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


def test_the_checksum_of_cropped_files_differs_by_border_and_content(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", 1, size=(9, 9))
    first = [data_checksum(data_of(BenchmarkImages(CroppedFiles([path], border), ["x"]))) for border in (1, 2)]
    write_picture(path, 2, size=(9, 9))
    last = data_checksum(data_of(BenchmarkImages(CroppedFiles([path], 2), ["x"])))
    assert len({*first, last}) == 3
