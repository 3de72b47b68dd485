"""The checksum of data changes with everything that a number depends on, and with nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llm2clip.evaluation.benchmarks.checksum import HEAD, data_checksum
from llm2clip.evaluation.benchmarks.encoded_images import ArchivedImages, FilePart
from llm2clip.evaluation.data import BenchmarkImages, ClassificationData, RetrievalData


def retrieval(folder: Path) -> RetrievalData:
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in ("a.png", "b.png")]
    for path in paths:
        path.write_bytes(b"image " + path.name.encode())
    return RetrievalData.from_captions(BenchmarkImages(paths), [["one", "two"], ["three"]])


def test_texts_owners_order_and_images_count_and_the_folder_does_not(tmp_path: Path) -> None:
    data = retrieval(tmp_path / "x")
    expected = data_checksum(data)
    assert data_checksum(retrieval(tmp_path / "y")) == expected
    paths = list(data.images.images)
    others = [
        replace(data, texts=["one", "two ", "three"]),
        replace(data, texts=["onet", "wo", "three"]),
        replace(data, owners=torch.tensor([0, 1, 1])),
        replace(data, qrels=torch.tensor([[0, 1]])),
        replace(data, images=BenchmarkImages(paths[::-1])),
        {"en": data},
    ]
    sums = [data_checksum(other) for other in others]
    paths[0].write_bytes(b"image c.png")
    sums.append(data_checksum(data))
    assert len({expected, *sums}) == len(others) + 2


def test_encoded_images_labels_and_training_images_count() -> None:
    data = ClassificationData(BenchmarkImages([b"1", b"2"], ["x", "y"]), torch.tensor([0, 1]), ["cat", "dog"])
    changes: list[dict[str, Any]] = [
        {"images": BenchmarkImages([b"1", b"3"], ["x", "y"])}, {"labels": torch.tensor([1, 1])},
        {"classnames": ["cat", "Dog"]}, {"templates": ["{c}"]}, {"train": replace(data)},
    ]  # fmt: skip
    sums = {data_checksum(data), *(data_checksum(replace(data, **change)) for change in changes)}
    assert len(sums) == len(changes) + 1


def test_the_head_of_an_archived_image_counts_and_the_rest_does_not(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"

    def checksum(content: bytes) -> str:
        path.write_bytes(content)
        return data_checksum(BenchmarkImages(ArchivedImages([FilePart(path, 1, len(content) - 1)]), ["x"]))

    content = bytes(2 * HEAD)
    expected = checksum(content)
    assert checksum(content[:-1] + b"1") == checksum(b"1" + content[1:]) == expected
    assert len({expected, checksum(content + b"0"), checksum(b"11" + content[2:])}) == 3
