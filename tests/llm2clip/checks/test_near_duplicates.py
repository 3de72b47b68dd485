"""A picture of one split that is also in another is found, in whatever size and format."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from llm2clip import cli
from llm2clip.checks.near_duplicates import HashCheck, near_duplicates
from llm2clip.checks.row_checks import ImageFacts, RowFacts
from tests.builders.tables import write_table
from tests.pictures import encode


def check_of(hashes: dict[str, int]) -> HashCheck:
    check = HashCheck()
    for key, number in hashes.items():
        check.add(RowFacts(key, {}, image=ImageFacts(1, 1, hash=number)))
    return check


def test_distances_are_those_of_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip.checks.near_duplicates.NEAR", 64)
    generator = random.Random(0)
    numbers = {str(row): generator.getrandbits(64) for row in range(40)}
    others = {str(row): generator.getrandbits(64) for row in range(30)}
    found = near_duplicates(check_of(numbers), check_of(others))
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


@pytest.fixture
def splits(tmp_path: Path) -> str:
    """Training images 0 to 5; of the test images, two are training images in another size and format."""
    train = [encode(drawing(seed)) for seed in range(6)]
    copies = [encode(drawing(1).resize((70, 70)), "JPEG", quality=80), encode(drawing(4, 192))]
    for split, images in {"train": train, "test": [encode(drawing(50)), *copies, b"broken"]}.items():
        fields = {"key": [f"{split}{row}" for row in range(len(images))], "image": images}
        write_table(tmp_path / f"{split}.parquet", fields | {"caption": ["a drawing"] * len(images)})
    return str(tmp_path)


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("streaming", ["false", "true"], ids=["prepared", "stream"])
def test_training_images_that_are_in_the_test_split(
    streaming: str, workers: str, splits: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("imagehash", reason="imagehash is not installed")
    monkeypatch.setenv("COLUMNS", "200")  # nothing is wrapped
    output = Path(splits, "report.json")
    arguments = ["check-data", splits, "--split", "train", "--num-workers", workers, "--streaming", streaming]
    assert cli.main([*arguments, "--other-splits", "test", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    finding = report["findings"]["images that are also in test"]
    assert [example["key"] for example in finding["examples"]] == ["train1", "train4"]
    assert [example["detail"].split()[0] for example in finding["examples"]] == ["test1", "test2"]
    assert (finding["count"], finding["stops"], report["usable_rows"]) == (2, False, 6)
    assert "images that are also in test" in capsys.readouterr().out
    assert cli.main([*arguments, "--other-splits", "test", "--no-images"]) == 2
    assert "drop one of them" in capsys.readouterr().err
