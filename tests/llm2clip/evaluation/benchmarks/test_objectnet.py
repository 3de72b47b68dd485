"""ObjectNet: its classes, names and border."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from llm2clip.evaluation.benchmark import BenchmarkError
from modeling_llm2clip.image_decoding_llm2clip import decode_image
from tests.llm2clip.evaluation.benchmarks.samples import read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three folders, of which ImageNet knows two; their order is another by label, and in the file, than by folder."""
    root = tmp_path / "objectnet-1.0"
    (root / "mappings").mkdir(parents=True)
    labels = {"cd_case": "CD case", "bath_towel": "Bath towel", "alarm_clock": "Zz Clock"}
    (root / "mappings/folder_to_objectnet_label.json").write_text(json.dumps(labels))
    shared = {"Bath towel": "bath towel", "Zz Clock": "analog clock; digital clock"}
    (root / "mappings/objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    for shade, name in enumerate(labels):
        (root / "images" / name).mkdir(parents=True)
        image = Image.new("RGB", (9, 7), (255, 0, 0))
        image.paste((shade, shade, shade), (2, 2, 7, 5))
        image.save(root / "images" / name / "one.png")
    return tmp_path


def test_only_shared_classes_count_under_their_lower_case_names(folder: Path) -> None:
    data = read("objectnet", folder)
    assert data.classnames == ["zz clock", "bath towel"]
    assert data.labels.tolist() == [0, 1]
    image = data.images.decode(1, decode_image)
    assert image.size == (9, 7)
    assert image.getpixel((1, 1)) == (255, 0, 0)


def test_border_is_cut_off_under_another_name(folder: Path) -> None:
    data = read("objectnet-cropped", folder)
    image = data.images.decode(1, decode_image)
    assert image.size == (5, 3)
    assert set(image.get_flattened_data()) == {(1, 1, 1)}
    assert data.images.key(1).endswith("bath_towel/one.png")


def test_mappings_that_do_not_fit_are_refused(folder: Path) -> None:
    path = folder / "objectnet-1.0/mappings/folder_to_objectnet_label.json"
    path.write_text(json.dumps({"alarm_clock": "Zz Clock"}))
    with pytest.raises(BenchmarkError, match="2 classes have an ImageNet class, but 1 a folder"):
        read("objectnet", folder)
