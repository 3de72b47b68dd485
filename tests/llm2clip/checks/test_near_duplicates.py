"""A picture of one split that is also in another is found, in whatever size and format."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image, ImageDraw

from llm2clip import cli
from llm2clip.checks.check_data import check_data
from llm2clip.checks.near_duplicates import HashCheck, near_duplicates
from llm2clip.checks.row_checks import ImageFacts, RowFacts
from llm2clip.data import CaptionSource


def check_of(hashes: dict[str, int]) -> HashCheck:
    check = HashCheck()
    for key, number in hashes.items():
        check.add(RowFacts(key, {}, image=ImageFacts(1, 1, hash=number)))
    return check


def test_distances_are_those_of_the_bits() -> None:
    generator = random.Random(0)
    numbers = {str(row): generator.getrandbits(64) for row in range(40)}
    others = {str(row): generator.getrandbits(64) for row in range(30)}
    found = near_duplicates(check_of(numbers), check_of(others), near=64)
    for example in found.examples:
        distances = {key: (numbers[example["key"]] ^ number).bit_count() for key, number in others.items()}
        original = min(distances, key=lambda key: distances[key])
        assert example["detail"] == f"{original} differs in {distances[original]} of 64 bits"
    assert found.count == 40


def drawing(seed: int, size: int = 96) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for left, top, width, red, green in torch.randint(0, 200, (12, 5), generator=generator).tolist():
        corner = (left * size / 256, top * size / 256)
        draw.ellipse((*corner, corner[0] + width * size / 512, corner[1] + size / 5), fill=(red, green, 90))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def splits(tmp_path: Path) -> str:
    """Training images 0 to 5; of the test images, two are training images in another size and format."""
    train = [encoded(drawing(seed)) for seed in range(6)]
    copies = [encoded(drawing(1).resize((70, 70)), "JPEG", quality=80), encoded(drawing(4, 192))]
    for split, images in {"train": train, "test": [encoded(drawing(50)), *copies, b"broken"]}.items():
        fields = {"key": [f"{split}{row}" for row in range(len(images))], "image": images}
        table = datasets.Dataset.from_dict(fields | {"caption": ["a drawing"] * len(images)})
        table.to_parquet(tmp_path / f"{split}.parquet")
    return str(tmp_path)


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "stream"])
def test_training_images_that_are_in_the_test_split(splits: str, streaming: bool) -> None:
    pytest.importorskip("imagehash", reason="imagehash is not installed")
    source = CaptionSource(splits, split="train", streaming=streaming)
    report = check_data(source, num_workers=0, other_splits=["test"])
    finding = report["findings"]["images that are also in test"]
    assert [example["key"] for example in finding["examples"]] == ["train1", "train4"]
    assert [example["detail"].split()[0] for example in finding["examples"]] == ["test1", "test2"]
    assert (finding["count"], finding["stops"]) == (2, False)
    assert report["usable_rows"] == 6


def test_the_command_compares_splits(
    splits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("imagehash", reason="imagehash is not installed")
    monkeypatch.setenv("COLUMNS", "200")  # nothing is wrapped
    output = str(tmp_path / "report.json")
    arguments = ["check-data", splits, "--split", "train", "--num-workers", "2"]
    assert cli.main([*arguments, "--other-splits", "test", "--output", output]) == 0
    assert json.loads(Path(output).read_text())["findings"]["images that are also in test"]["count"] == 2
    assert "images that are also in test" in capsys.readouterr().out
    assert cli.main([*arguments, "--other-splits", "test", "--no-images"]) == 2
    assert "drop one of them" in capsys.readouterr().err
