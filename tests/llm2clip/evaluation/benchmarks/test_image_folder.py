"""Own images in folders of classes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks, choose_benchmarks
from llm2clip.evaluation.benchmarks.image_folder import read_class_folders
from llm2clip.evaluation.prompts import template_set
from tests.llm2clip.evaluation.benchmarks.pictures import shades, write_picture


def test_labels_follow_the_sorted_names_of_folders_and_files(tmp_path: Path) -> None:
    write_picture(tmp_path / "test/sea_lion/b.png", 2)
    write_picture(tmp_path / "test/sea_lion/a.JPG", 1)
    write_picture(tmp_path / "test/Zebra/x.webp", 3)
    write_picture(tmp_path / "test/.cache/x.png", 9)
    write_picture(tmp_path / "test/Zebra/.hidden.png", 9)
    (tmp_path / "test/Zebra/notes.txt").write_text("no image")
    benchmark = all_benchmarks()["imagefolder"]
    folder = benchmark.find(tmp_path)
    assert folder == tmp_path
    data = benchmark.read(folder)
    assert data.classnames == ["Zebra", "sea lion"]
    assert data.labels.tolist() == [0, 1, 1]
    assert shades(data.images) == [3, 1, 2]
    assert data.templates == template_set("openai-80")
    assert data.counts() == {"images": 3, "classes": 2}
    assert data.train is None


def test_folders_with_numbers_are_sorted_by_value(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        write_picture(tmp_path / f"test/{number}/image.png", number)
    data = all_benchmarks()["imagefolder"].read(tmp_path)
    assert (shades(data.images), data.classnames) == ([1, 2, 10], ["1", "2", "10"])
    write_picture(tmp_path / "test/cat/image.png", 3)
    data = all_benchmarks()["imagefolder"].read(tmp_path)
    assert (shades(data.images), data.classnames) == ([1, 10, 2, 3], ["1", "10", "2", "cat"]), "not all are numbers"


def test_own_names_templates_train_and_validation_images_are_read(tmp_path: Path) -> None:
    for split, shade in (("test", 1), ("train", 2), ("val", 3)):
        for name in ("a", "b"):
            write_picture(tmp_path / split / name / "image.png", shade)
    (tmp_path / "classnames.txt").write_text("Äpfel\nBirnen\n", encoding="utf-8")
    (tmp_path / "templates.txt").write_text("ein Foto: {c}\n{c}\n", encoding="utf-8")
    (probe,) = choose_benchmarks(["imagefolder-probe-sgd"], tmp_path)
    assert probe.find(tmp_path) == tmp_path
    data = probe.read(tmp_path)
    assert data.classnames == data.train.classnames == ["Äpfel", "Birnen"]
    assert data.templates == ["ein Foto: {c}", "{c}"]
    assert [shades(part.images) for part in (data, data.train, data.validation)] == [[1, 1], [2, 2], [3, 3]]
    for count in (1, 3):
        (tmp_path / "classnames.txt").write_text("Äpfel\n" * count, encoding="utf-8")
        with pytest.raises(BenchmarkError, match=f"has {count} names for 2 classes"):
            probe.read(tmp_path)


def test_all_found_takes_folders_of_classes_but_not_tars(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test/nshards.txt").write_text("1\n")
    assert all_benchmarks()["imagefolder"].find(tmp_path) is None


def test_unknown_folders_are_refused_and_classes_without_images_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_picture(tmp_path / "a/image.png")
    (tmp_path / "b").mkdir()
    with caplog.at_level(logging.WARNING):
        paths, labels = read_class_folders("Title", tmp_path, ["c", "a", "b"])
    assert (paths, labels) == ([tmp_path / "a/image.png"], [1])
    assert "has no image of 2 classes: c, b" in caplog.text
    with pytest.raises(BenchmarkError, match=r"Title: .* has 1 folders of no class: b"):
        read_class_folders("Title", tmp_path, ["a"])
    with pytest.raises(BenchmarkError, match="has no image in folders such as b, c"):
        read_class_folders("Title", tmp_path, ["b", "c"], ignored=["a"])
