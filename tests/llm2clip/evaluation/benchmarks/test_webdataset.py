r"""Sets in CLIP_benchmark's form; samples are written as its converter does, byte for byte."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip.data.opened_table import SourceError
from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.benchmarks.encoded_images import ArchivedImages
from llm2clip.evaluation.benchmarks.webdataset import SETS, read_classification, read_retrieval
from llm2clip.evaluation.prompts import template_set
from tests.llm2clip.evaluation.benchmarks.pictures import picture, shades
from tests.llm2clip.evaluation.benchmarks.samples import read
from tests.tars import write_tar


def write_split(folder: Path, tars: Sequence[Sequence[tuple[str, bytes]]]) -> None:
    for number, files in enumerate(tars):
        write_tar(folder / f"{number}.tar", files)
    (folder / "nshards.txt").write_text(f"{len(tars)}\n")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Eleven tars, so that 10 sorted as text comes before 2; suffixes of all kinds, a label before its image."""
    root = tmp_path / "webdataset"
    suffixes = ["webp", "png", "jpg", "jpeg"]
    tars = []
    for number in range(11):
        suffix = suffixes[number % 4]
        image = (f"s{number:07d}.{suffix}", picture(10 * number, "webp" if suffix == "webp" else "png"))
        label = (f"s{number:07d}.cls", str(number % 3).encode())
        tars.append([label, image] if number == 4 else [image, label])
    write_split(root / "test", tars)
    (root / "classnames.txt").write_text("a\nb\nlast one \n")
    return root


def test_labels_and_images_are_read_in_the_order_of_the_tars(classes: Path) -> None:
    data = read("webdataset", classes.parent)
    assert data.labels.tolist() == [number % 3 for number in range(11)]
    assert shades(data.images) == [10 * number for number in range(11)]
    assert data.classnames == ["a", "b", "last one"]
    assert data.templates == template_set("openai-80")
    assert data.images.key(10) == "10.tar/s0000010"
    (classes / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}.\n")
    assert read("webdataset", classes).templates == ["a {c}", "the {c}."]


def test_files_of_one_folder_and_name_up_to_the_first_dot_are_a_sample(classes: Path) -> None:
    """Of several images the one that CLIP_benchmark would take; suffixes in any case."""
    one = [("a/s.PNG", picture(1)), ("a/s.meta.json", b"{}"), ("a/s.cls", b"0")]
    other = [("b/s.jpg", picture(2)), ("b/s.webp", picture(3, "webp")), ("b/s.png", picture(4)), ("b/s.CLS", b"2")]
    write_split(classes / "test", [[*one, *other]])
    data = read_classification(classes)
    assert (shades(data.images), data.labels.tolist()) == ([1, 3], [0, 2])
    assert [data.images.key(row) for row in range(2)] == ["0.tar/a/s", "0.tar/b/s"]


def test_images_stay_in_the_tars_until_they_are_asked_for(classes: Path) -> None:
    """A set of gigabytes is listed, not loaded: after its tar is cut, only the images behind the cut are gone."""
    data = read_classification(classes)
    assert isinstance(data.images.images, ArchivedImages)
    path = classes / "test/3.tar"
    path.write_bytes(path.read_bytes()[:520])
    assert data.images.images[2].startswith(b"\x89PNG")
    with pytest.raises(SourceError, match=r"3.tar ends before byte"):
        data.images.images[3]


def test_captions_are_split_at_newlines_and_inner_ones_restored(tmp_path: Path) -> None:
    text = "first, with ümlaut\n line 1\\nline 2 \n\nfirst, with ümlaut\u2028x"
    files = [("s0.png", picture(1)), ("s0.txt", text.encode()), ("s1.txt", b"one"), ("s1.webp", picture(2, "webp"))]
    write_split(tmp_path / "test", [files])
    (tmp_path / "dataset_type.txt").write_text("Retrieval\n")
    data = read("webdataset-retrieval", tmp_path)
    assert data.texts == ["first, with ümlaut", " line 1\nline 2 ", "", "first, with ümlaut\u2028x", "one"]
    assert data.owners.tolist() == [0, 0, 0, 0, 1]
    assert shades(data.images) == [1, 2]
    with pytest.raises(BenchmarkError, match="has captions, not labels: use webdataset-retrieval"):
        read_classification(tmp_path)


def test_sets_of_another_kind_and_without_names_are_refused(classes: Path) -> None:
    with pytest.raises(BenchmarkError, match="has labels, not captions: use webdataset"):
        read_retrieval(classes)
    (classes / "dataset_type.txt").write_text("multilabel\n")
    with pytest.raises(BenchmarkError, match="several labels an image"):
        read_classification(classes)
    (classes / "dataset_type.txt").unlink()
    (classes / "classnames.txt").unlink()
    with pytest.raises(BenchmarkError, match=r"has no classnames.txt: without names of the classes"):
        read_classification(classes)


def test_pickled_labels_are_never_loaded(classes: Path) -> None:
    """A .npy of objects is a pickle; a label that is one is a broken label, and no code runs."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("a pickle was loaded",))

    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    write_split(classes / "test", [[("s0.png", picture(1)), ("s0.npy", stream.getvalue())]])
    with pytest.raises(BenchmarkError, match=r"needs an image .* and a .cls, but has .png, .npy"):
        read_classification(classes)
    write_split(classes / "test", [[("s0.png", picture(1)), ("s0.cls", pickle.dumps(1))]])
    with pytest.raises(BenchmarkError, match=r"s0.cls of .*0.tar is broken"):
        read_classification(classes)


def test_missing_tars_samples_and_damage_are_named(classes: Path) -> None:
    (classes / "test/nshards.txt").write_text("12\n")
    with pytest.raises(BenchmarkError, match=r"has 12 tars by nshards.txt, but no 11.tar"):
        read_classification(classes)
    (classes / "test/nshards.txt").write_text("many\n")
    with pytest.raises(BenchmarkError, match="has no number: 'many'"):
        read_classification(classes)
    (classes / "test/nshards.txt").write_text("1\n")
    write_tar(classes / "test/0.tar", [("s1.cls", b"1")])
    with pytest.raises(BenchmarkError, match=r"sample s1 of .*0.tar needs an image \(webp, png, jpg, jpeg\)"):
        read_classification(classes)
    (classes / "test/0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(BenchmarkError, match="is not an uncompressed tar, or is damaged"):
        read_classification(classes)


def test_sets_are_known_by_their_folders_and_compare_the_mean_of_classes_where_it_is_usual(
    classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = all_benchmarks()
    pets = classes.rename(classes.parent / "wds_vtab-pets")
    assert known["pets"].find(pets) == known["pets"].find(pets.parent) == pets
    assert known["food101"].find(pets) is None
    monkeypatch.chdir(pets)
    assert known["pets"].find(Path()) == Path()
    assert known["pets"].read(pets).mean_per_class
    assert not known["webdataset"].read(pets).mean_per_class
    assert [row[1] for row in SETS if row[4]] == ["FGVC Aircraft", "Oxford Pets", "Caltech-101", "Oxford Flowers"]


class Rows(torch.utils.data.Dataset):
    """Rows as a CLIP_benchmark data set with a transform to bytes has them."""

    def __init__(self, rows: Sequence[tuple[bytes, Any]]) -> None:
        self.rows = rows
        self.classes, self.templates = ["cat", "dog"], ["a {c}"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[bytes, Any]:
        return self.rows[row]


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CLIP_benchmark's converter in one process; it starts eight workers."""
    pytest.importorskip("webdataset", reason="with which CLIP_benchmark writes tars")
    from clip_benchmark import webdataset_builder

    loader = torch.utils.data.DataLoader

    def one_process(*arguments: Any, num_workers: int, **options: Any) -> Any:
        return loader(*arguments, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", one_process)
    return webdataset_builder


def test_what_the_converter_of_clip_benchmark_writes_is_read(converter: Any, tmp_path: Path) -> None:
    rows = [(picture(number, "webp"), number % 2) for number in range(5)]
    converter.convert_dataset(Rows(rows), "test", str(tmp_path / "labels"), max_count=2, verbose=False)
    data = read_classification(tmp_path / "labels")
    assert data.labels.tolist() == [0, 1, 0, 1, 0]
    assert list(data.images.images) == [content for content, _ in rows]
    assert (data.classnames, data.templates) == (["cat", "dog"], ["a {c}"])
    captions = [["one", "two\nlines"], ["", "three"]]
    converter.convert_retrieval_dataset(
        Rows([(picture(number, "webp"), texts) for number, texts in enumerate(captions)]),
        "test", str(tmp_path / "captions"), verbose=False,
    )  # fmt: skip
    found = read_retrieval(tmp_path / "captions")
    assert found.texts == ["one", "two\nlines", "", "three"]
    assert found.owners.tolist() == [0, 0, 1, 1]
