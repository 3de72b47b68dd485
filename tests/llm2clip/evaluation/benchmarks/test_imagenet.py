"""ImageNet-1k in its three layouts, and the sets with its classes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.benchmarks.counts import check_counts
from llm2clip.evaluation.benchmarks.imagenet import DEVKIT, TAR, TRUTH
from llm2clip.evaluation.prompts import imagenet_classes, imagenet_subset, template_set
from tests.llm2clip.evaluation.benchmarks.pictures import picture, shades, write_picture
from tests.llm2clip.evaluation.benchmarks.samples import read

WNIDS = list(imagenet_classes())
# In the order of ILSVRC's own numbers, which are not the labels: n02119789 is 1, n02100735 is 2.
NUMBERED = ["n02119789", "n02100735", "n01440764"]


def file_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def write_devkit(path: Path, truth: list[int]) -> None:
    """A devkit with the fields that its table has: 1-based numbers and WordNet ids, inner synsets included."""
    rows = [(number, wnid, "words", "gloss", 0) for number, wnid in enumerate([*NUMBERED, "n00000000"], 1)]
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    table = io.BytesIO()
    savemat(table, {"synsets": np.array(rows, dtype=kind)[:, None]})
    text = "".join(f"{number}\n" for number in truth).encode()
    write_tar(path, [("ILSVRC2012_devkit_t12/data/meta.mat", table.getvalue()), (f"x/data/{TRUTH}", text)], "w:gz")


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_folders_of_wordnet_ids(tmp_path: Path) -> None:
    """The label is the rank of the id among all 1,000, whichever folders are there."""
    for number, wnid in enumerate([WNIDS[999], WNIDS[2]]):
        write_picture(tmp_path / f"imagenet/val/{wnid}/{file_name(number)}", number)
    write_picture(tmp_path / f"imagenet/val/{WNIDS[0]}/{file_name(7)}", 7)
    write_picture(tmp_path / f"imagenet/train/{WNIDS[5]}/n.JPEG", 5)
    data = read("imagenet-1k", tmp_path)
    assert data.labels.tolist() == [0, 2, 999]
    assert shades(data.images) == [7, 1, 0]
    assert data.classnames[:3] == ["tench", "goldfish", "great white shark"]
    assert data.train is None
    assert read("imagenet-1k-probe-lbfgs", tmp_path).train.labels.tolist() == [5]
    with pytest.raises(
        BenchmarkError, match=r"3 images instead of 50,000 .*, 3 classes instead of 1,000 .*: goldfish, tiger"
    ):
        check_counts(all_benchmarks()["imagenet-1k"], tmp_path / "imagenet", data, allow=False)


def test_the_single_template_of_the_paper_is_a_benchmark_of_its_own(tmp_path: Path) -> None:
    write_picture(tmp_path / f"val/{WNIDS[0]}/{file_name(1)}")
    single, usual = (all_benchmarks()[name] for name in ("imagenet-1k-single", "imagenet-1k"))
    assert single.options == {"templates": ("a photo of the {c}",)}
    assert read("imagenet-1k", tmp_path).templates == template_set("openai-80")
    assert "paper" in single.groups
    assert "paper" in usual.groups


def test_flat_images_with_the_files_of_labels(tmp_path: Path) -> None:
    for number in (2, 1, 3):
        write_picture(tmp_path / "val" / file_name(number), number)
    with pytest.raises(BenchmarkError, match="have no labels: give them in folders val/nXXXXXXXX, or put"):
        read("imagenet-1k", tmp_path)
    (tmp_path / "imagenet2012_mapclsloc.txt").write_text("n02119789 1 kit_fox\nn02100735 2 English_setter\n")
    (tmp_path / TRUTH).write_text("2\n1\n1\n")
    data = read("imagenet-1k", tmp_path)
    assert [WNIDS[label] for label in data.labels.tolist()] == ["n02100735", "n02119789", "n02119789"]
    assert shades(data.images) == [1, 2, 3]
    for count in (2, 4):
        (tmp_path / TRUTH).write_text("1\n" * count)
        with pytest.raises(BenchmarkError, match=f"has {count} labels for 3 images"):
            read("imagenet-1k", tmp_path)
    (tmp_path / TRUTH).write_text("2\n1\n9\n")
    with pytest.raises(BenchmarkError, match="no class of ImageNet-1k: 9"):
        read("imagenet-1k", tmp_path)


def test_flat_images_with_the_id_in_their_names(tmp_path: Path) -> None:
    write_picture(tmp_path / "val/ILSVRC2012_val_00000002_n01440764.JPEG")
    write_picture(tmp_path / "val/ILSVRC2012_val_00000001_n01484850.JPEG")
    assert read("imagenet-1k", tmp_path).labels.tolist() == [2, 0]
    write_picture(tmp_path / "val" / file_name(3))
    with pytest.raises(BenchmarkError, match="have no labels"):
        read("imagenet-1k", tmp_path)


def test_flat_images_with_devkit(tmp_path: Path) -> None:
    for number in (2, 1):
        write_picture(tmp_path / "val" / file_name(number), number)
    write_devkit(tmp_path / DEVKIT, [2, 3])
    data = read("imagenet-1k", tmp_path)
    assert [WNIDS[label] for label in data.labels.tolist()] == ["n02100735", "n01440764"]


def test_tar_with_devkit(tmp_path: Path) -> None:
    """The files of the tar are in no order; labels go by their names."""
    write_tar(tmp_path / TAR, [(file_name(number), picture(number)) for number in (3, 1, 2)])
    with pytest.raises(BenchmarkError, match=r"but not ILSVRC2012_devkit_t12\.tar\.gz, which has its labels"):
        read("imagenet-1k", tmp_path)
    write_devkit(tmp_path / DEVKIT, [2, 1, 3])
    data = read("imagenet-1k", tmp_path)
    assert [WNIDS[label] for label in data.labels.tolist()] == ["n02100735", "n02119789", "n01440764"]
    assert shades(data.images) == [1, 2, 3]
    assert [data.images.key(row) for row in range(3)] == [file_name(number) for number in (1, 2, 3)]


def test_labels_of_v2_are_the_numbers_of_its_folders(tmp_path: Path) -> None:
    """Sorted as text, 10 would come before 2."""
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    for label in (0, 2, 10, 999):
        write_picture(folder / str(label) / "image.jpeg", label % 256)
    data = read("imagenet-v2", tmp_path)
    assert data.labels.tolist() == [0, 2, 10, 999]
    assert shades(data.images) == [0, 2, 10, 999 % 256]
    assert data.classnames[10] == "brambling"
    assert all_benchmarks()["imagenet-v2"].find(folder) == folder
    assert all_benchmarks()["imagenet-v2-top"].find(folder) is None
    (folder / "1000").mkdir()
    with pytest.raises(BenchmarkError, match="folders of no class: 1000"):
        read("imagenet-v2", tmp_path)


@pytest.mark.parametrize(("name", "subset"), [("imagenet-a", "a"), ("imagenet-r", "r"), ("imagenet-o", "o")])
def test_subsets_are_200_way_in_the_order_of_their_own_ids(tmp_path: Path, name: str, subset: str) -> None:
    ids = imagenet_subset(subset)
    for label in (199, 1, 0):
        write_picture(tmp_path / name / ids[label] / "image.jpg", label)
    (tmp_path / name / "README.txt").write_text("about")
    data = read(name, tmp_path)
    assert data.labels.tolist() == shades(data.images) == [0, 1, 199]
    assert len(data.classnames) == 200
    assert data.classnames[1] == imagenet_classes()[ids[1]]
    write_picture(tmp_path / name / next(wnid for wnid in WNIDS if wnid not in ids) / "image.jpg")
    with pytest.raises(BenchmarkError, match="has 1 folders of no class"):
        read(name, tmp_path)


def test_sketch_has_all_classes(tmp_path: Path) -> None:
    write_picture(tmp_path / "sketch" / WNIDS[0] / "sketch_0.JPEG", 4)
    write_picture(tmp_path / "sketch" / WNIDS[998] / "sketch_0.JPEG", 5)
    data = read("imagenet-sketch", tmp_path)
    assert data.labels.tolist() == [0, 998]
    assert data.classnames == list(imagenet_classes().values())
