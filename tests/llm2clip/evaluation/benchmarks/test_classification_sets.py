"""Readers of sets of classification, on samples in their exact file formats, against values written by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks.image_folder import read_class_folders
from llm2clip.evaluation.prompts import template_set
from modeling_llm2clip.image_decoding_llm2clip import decode_image
from tests.llm2clip.evaluation.benchmarks.classification_samples import BROKEN, SAMPLES, TRAIN, write_files
from tests.llm2clip.evaluation.benchmarks.samples import picture, read, shades, write


@pytest.mark.parametrize("sample", SAMPLES)
def test_images_labels_and_names(sample: str, tmp_path: Path) -> None:
    name, files, labels, colours, names = SAMPLES[sample]
    write_files(tmp_path, files)
    data = read(name, tmp_path)
    assert data.labels.tolist() == labels
    assert shades(data.images) == colours
    assert {number: data.classnames[number] for number in names} == names
    assert data.templates == template_set("openai-80")
    assert data.train is None


@pytest.mark.parametrize("sample", TRAIN)
def test_train_images_are_read_for_probes(sample: str, tmp_path: Path) -> None:
    name = f"{SAMPLES[sample].name}-probe-sgd"
    more, labels = TRAIN[sample]
    write_files(tmp_path, SAMPLES[sample].files | more)
    data = read(name, tmp_path)
    assert data.train.labels.tolist() == labels
    assert data.train.classnames == data.classnames


@pytest.mark.parametrize(("sample", "changed", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_and_missing_files_are_named(
    sample: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_files(tmp_path, SAMPLES[sample].files)
    write_files(tmp_path, changed)
    with pytest.raises(BenchmarkError, match=message):
        read(SAMPLES[sample].name, tmp_path)


def test_the_border_of_objectnet_is_cut_off_under_another_name(tmp_path: Path) -> None:
    write_files(tmp_path, SAMPLES["objectnet"].files)
    names = ("objectnet", "objectnet-cropped")
    whole, cropped = (read(name, tmp_path).images.decode(1, decode_image) for name in names)
    assert (whole.size, cropped.size) == ((9, 7), (5, 3))
    assert set(cropped.get_flattened_data()) == {(1, 1, 1)}


def test_own_templates_and_validation_images_are_read(tmp_path: Path) -> None:
    for split, shade in (("test", 1), ("train", 2), ("val", 3)):
        write(tmp_path / split / "a" / "image.png", picture(shade))
    (tmp_path / "templates.txt").write_text("ein Foto: {c}\n{c}\n", encoding="utf-8")
    data = read("imagefolder-probe-sgd", tmp_path)
    assert data.templates == ["ein Foto: {c}", "{c}"]
    assert [shades(part.images) for part in (data, data.train)] == [[1], [2, 3]]


def test_unknown_folders_are_refused_and_classes_without_images_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a/image.png")
    (tmp_path / "b").mkdir()
    with caplog.at_level(logging.WARNING):
        assert read_class_folders("Title", tmp_path, ["c", "a", "b"]) == ([tmp_path / "a/image.png"], [1])
    assert "has no image of 2 classes: c, b" in caplog.text
    with pytest.raises(BenchmarkError, match=r"Title: .* has 1 folders of no class: b"):
        read_class_folders("Title", tmp_path, ["a"])
