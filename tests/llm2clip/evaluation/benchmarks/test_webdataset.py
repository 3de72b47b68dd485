"""Sets in CLIP_benchmark's form, where they are more than the tables of classification_samples.py say."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip.data.formats import SourceError
from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.benchmarks.encoded_images import ArchivedImages
from llm2clip.evaluation.benchmarks.webdataset import Webdataset
from tests.llm2clip.evaluation.benchmarks.classification_samples import SAMPLES, webdataset, write_files
from tests.llm2clip.evaluation.benchmarks.samples import picture, read, shades

LABELS = Webdataset(layout="webdataset", answer="cls")
CAPTIONS = Webdataset(layout="webdataset", answer="txt")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """The folder of a set of eleven tars."""
    folder = tmp_path / "webdataset"
    write_files(folder, SAMPLES["webdataset"].files)
    return folder


def test_own_templates_and_keys_are_read(classes: Path) -> None:
    (classes / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}.\n")
    data = read("webdataset", classes)
    assert data.templates == ["a {c}", "the {c}."]
    assert data.images.key(10) == "10.tar/s0000010"


def test_images_stay_in_the_tars_until_they_are_asked_for(classes: Path) -> None:
    """A set of gigabytes is listed, not loaded: after its tar is cut, only the images behind the cut are gone."""
    data = LABELS.read(classes)
    assert isinstance(data.images.images, ArchivedImages)
    path = classes / "test/3.tar"
    path.write_bytes(path.read_bytes()[:520])
    assert data.images.images[2].startswith(b"\x89PNG")
    with pytest.raises(SourceError, match=r"3.tar ends before byte"):
        data.images.images[3]


def test_captions_are_split_at_newlines_and_inner_ones_restored(tmp_path: Path) -> None:
    text = "first, with ümlaut\n line 1\\nline 2 \n\nfirst, with ümlaut\u2028x"
    members = {"s0.png": picture(1), "s0.txt": text.encode(), "s1.txt": b"one", "s1.webp": picture(2, "webp")}
    write_files(tmp_path, webdataset(members) | {"dataset_type.txt": "Retrieval\n"})
    data = read("webdataset-retrieval", tmp_path)
    assert data.texts == ["first, with ümlaut", " line 1\nline 2 ", "", "first, with ümlaut\u2028x", "one"]
    assert data.owners.tolist() == [0, 0, 0, 0, 1]
    assert shades(data.images) == [1, 2]
    first = Webdataset(layout="webdataset", answer="txt", first=2).read(tmp_path)
    assert (first.texts, first.owners.tolist()) == ([*data.texts[:2], "one"], [0, 0, 1])


def test_labels_are_not_taken_for_captions_and_need_names(classes: Path) -> None:
    with pytest.raises(BenchmarkError, match="is a set of classification, not of retrieval"):
        CAPTIONS.read(classes)
    (classes / "classnames.txt").unlink()
    assert all_benchmarks()["webdataset"].find(classes) is None


def test_pickled_labels_are_never_loaded(tmp_path: Path) -> None:
    """A .npy of objects is a pickle; a label that is one is a broken label, and no code runs."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("a pickle was loaded",))

    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    for members, message in (
        ({"s0.npy": stream.getvalue()}, r"needs an image .* and a .cls, but has .png, .npy"),
        ({"s0.cls": pickle.dumps(1)}, r"webdataset: a file in .* is damaged"),
    ):
        write_files(tmp_path, webdataset({"s0.png": picture(1), **members}))
        with pytest.raises(BenchmarkError, match=message):
            read("webdataset", tmp_path)


def test_sets_are_known_by_their_folders_and_compare_the_mean_of_classes_where_it_is_usual(
    classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = all_benchmarks()
    pets = classes.rename(classes.parent / "wds_vtab-pets")
    assert known["pets"].find(pets) == known["pets"].find(pets.parent) == pets
    assert known["food101"].find(pets) is None
    monkeypatch.chdir(pets)
    assert known["pets"].find(Path()) == Path()
    mean_per_class = {"fgvc-aircraft", "pets", "caltech101", "flowers"}
    sets = {name for name, known in known.items() if known.folder.startswith("wds_") and known.protocol != "retrieval"}
    assert {name for name in sets if known[name].read(pets).mean_per_class} == mean_per_class
    assert len(sets) == 8


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
    data = LABELS.read(tmp_path / "labels")
    assert data.labels.tolist() == [0, 1, 0, 1, 0]
    assert list(data.images.images) == [content for content, _ in rows]
    assert (data.classnames, data.templates) == (["cat", "dog"], ["a {c}"])
    captions = [["one", "two\nlines"], ["", "three"]]
    converter.convert_retrieval_dataset(
        Rows([(picture(number, "webp"), texts) for number, texts in enumerate(captions)]),
        "test", str(tmp_path / "captions"), verbose=False,
    )  # fmt: skip
    found = CAPTIONS.read(tmp_path / "captions")
    assert found.texts == ["one", "two\nlines", "", "three"]
    assert found.owners.tolist() == [0, 0, 1, 1]
