"""Images of archives and arrays, made when they are asked for."""

from __future__ import annotations

from pathlib import Path

import torch

from llm2clip.evaluation.benchmarks.checksum import HEAD, data_checksum
from llm2clip.evaluation.benchmarks.encoded_images import ArchivedImages, FilePart
from llm2clip.evaluation.data import BenchmarkImages, ClassificationData


def data_of(images: BenchmarkImages) -> ClassificationData:
    return ClassificationData(images, torch.zeros(len(images), dtype=torch.int64), ["a"])


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
