"""Readers of segmentation sets, on tiny folders in the layouts of the originals; values are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip.evaluation.benchmarks import (
    ade20k,
    all_benchmarks,
    cityscapes,
    coco_stuff,
    pascal_context,
    voc_segmentation,
)
from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.label_maps import IGNORED, SegmentationData, segmentation_classes
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError


def write(folder: Path, image: str, label: str, values: list[list[int]], palette: bool = False) -> None:
    """Write an image and its label map of the given values."""
    array = np.array(values, dtype=np.uint8)
    for path in (folder / image, folder / label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", array.shape[::-1], (1, 2, 3)).save(folder / image)
    picture = Image.fromarray(array)
    if palette:
        picture.putpalette([channel for level in range(256) for channel in (255 - level, level, 7)])
        assert picture.mode == "P"
    picture.save(folder / label)


def ade(folder: Path) -> Path:
    root = folder / "ADEChallengeData2016"
    for number, values in ((2, [[150, 0]]), (1, [[0, 1, 2], [13, 150, 255]])):
        name = f"validation/ADE_val_{number:08d}"
        write(root, f"images/{name}.jpg", f"annotations/{name}.png", values)
    write(root, "images/training/ADE_train_00000001.jpg", "annotations/training/ADE_train_00000001.png", [[1]])
    return root


def stuff(folder: Path) -> Path:
    root = folder / "coco_stuff164k"
    name = "val2017/000000000139"
    write(root, f"images/{name}.jpg", f"annotations/{name}.png", [[0, 10, 12, 89], [91, 181, 255, 255]])
    # What mmsegmentation's converter leaves beside it.
    Image.new("L", (4, 2), 3).save(root / f"annotations/{name}_labelTrainIds.png")
    return root


def voc(folder: Path) -> Path:
    root = folder / "VOCdevkit" / "VOC2012"
    write(root, "JPEGImages/2007_000033.jpg", "SegmentationClass/2007_000033.png", [[0, 1, 20, 255]], palette=True)
    write(root, "JPEGImages/2007_000032.jpg", "SegmentationClass/2007_000032.png", [[15]], palette=True)
    write(root, "JPEGImages/2007_000042.jpg", "SegmentationClass/2007_000042.png", [[19]], palette=True)
    listing = root / "ImageSets" / "Segmentation" / "val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("2007_000033\n2007_000032\n")
    return root


def city(folder: Path) -> Path:
    root = folder / "cityscapes"
    for name, values in (
        ("munster/munster_000000_000019", [[7, 8, 26], [33, 0, 9]]),
        ("frankfurt/frankfurt_000000_000294", [[11, 23, 31], [28, 29, 4]]),
    ):
        write(root, f"leftImg8bit/val/{name}_leftImg8bit.png", f"gtFine/val/{name}_gtFine_labelIds.png", values)
        for kind in ("instanceIds", "labelTrainIds", "color"):
            Image.new("L", (3, 2), 1).save(root / f"gtFine/val/{name}_gtFine_{kind}.png")
    return root


def context(folder: Path) -> Path:
    root = folder / "VOCdevkit" / "VOC2010"
    write(root, "JPEGImages/2008_000002.jpg", "SegmentationClassContext/2008_000002.png", [[0, 1, 2, 59]])
    listing = root / "ImageSets" / "SegmentationContext" / "val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("2008_000002\n")
    return root


FOLDERS: list[tuple[Benchmark, Callable[[Path], Path], list[list[list[int]]], dict[int, str]]] = [
    (
        ade20k.ADE20K,
        ade,
        [[[255, 0, 1], [12, 149, 255]], [[149, 255]]],
        {0: "wall", 7: "bed ", 12: "person", 149: "flag"},
    ),
    (
        coco_stuff.COCO_STUFF,
        stuff,
        [[[0, 10, 11, 79], [80, 170, 255, 255]]],
        {0: "person", 10: "fire hydrant", 11: "stop sign", 79: "toothbrush", 80: "banner", 170: "wood"},
    ),
    (voc_segmentation.VOC20, voc, [[[255, 0, 19, 255]], [[14]]], {0: "airplane", 14: "person", 19: "tv monitor"}),
    (voc_segmentation.VOC21, voc, [[[0, 1, 20, 255]], [[15]]], {0: "background", 1: "airplane", 15: "person"}),
    (
        cityscapes.CITYSCAPES,
        city,
        [[[2, 10, 16], [15, 255, 255]], [[0, 1, 13], [18, 255, 255]]],
        {0: "road", 1: "sidewalk", 2: "building", 10: "sky", 13: "car", 15: "bus", 16: "train", 18: "bicycle"},
    ),
    (pascal_context.PASCAL_CONTEXT, context, [[[255, 0, 1, 58]]], {0: "airplane", 1: "bag", 58: "wood"}),
]


@pytest.mark.parametrize(
    ("benchmark", "make", "expected", "names"), FOLDERS, ids=[benchmark.name for benchmark, *_ in FOLDERS]
)
def test_labels_are_the_classes_of_the_set(
    benchmark: Benchmark,
    make: Callable[[Path], Path],
    expected: list[list[list[int]]],
    names: dict[int, str],
    tmp_path: Path,
) -> None:
    assert benchmark.find(tmp_path) is None
    root = make(tmp_path)
    folder = benchmark.find(tmp_path)
    assert folder == root == benchmark.find(root)
    data: SegmentationData = benchmark.read(folder)
    assert [data.labels(row).tolist() for row in range(len(data.images))] == expected
    classes = list(data.classes)
    assert {number: classes[number] for number in names} == names
    assert data.counts() == {"images": len(expected), "classes": benchmark.counts["classes"]}
    assert max(data.class_of[data.class_of != IGNORED].tolist()) + 1 == benchmark.counts["classes"]


def test_images_are_in_the_order_of_their_names_or_of_the_list(tmp_path: Path) -> None:
    def names(data: SegmentationData) -> list[tuple[str, str]]:
        return [
            (Path(image).name, label.name) for image, label in zip(data.images.images, data.label_maps, strict=True)
        ]

    assert names(ade20k.read(ade(tmp_path))) == [
        ("ADE_val_00000001.jpg", "ADE_val_00000001.png"),
        ("ADE_val_00000002.jpg", "ADE_val_00000002.png"),
    ]
    assert names(voc_segmentation.read(voc(tmp_path))) == [
        ("2007_000033.jpg", "2007_000033.png"),
        ("2007_000032.jpg", "2007_000032.png"),
    ]
    assert names(cityscapes.read(city(tmp_path)))[0] == (
        "frankfurt_000000_000294_leftImg8bit.png",
        "frankfurt_000000_000294_gtFine_labelIds.png",
    )


def test_the_background_of_voc21_has_five_names(tmp_path: Path) -> None:
    data = voc_segmentation.read_with_background(voc(tmp_path))
    assert data.classes["background"] == ("building", "ground", "grass", "tree", "sky")
    assert data.classes["airplane"] == ("airplane",)


@pytest.mark.parametrize("lost", ["image", "label"])
def test_missing_files_are_named(lost: str, tmp_path: Path) -> None:
    readers = {
        ade20k.read: (ade, "images/validation/ADE_val_00000002.jpg", "annotations/validation/ADE_val_00000002.png"),
        voc_segmentation.read: (voc, "JPEGImages/2007_000032.jpg", "SegmentationClass/2007_000032.png"),
        cityscapes.read: (
            city,
            "leftImg8bit/val/munster/munster_000000_000019_leftImg8bit.png",
            "gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png",
        ),
    }
    for read, (make, image, label) in readers.items():
        root, name = make(tmp_path), image if lost == "image" else label
        (root / name).unlink()
        with pytest.raises(BenchmarkError, match="lacks 1 images or label maps") as error:
            read(root)
        assert str(root / name) in str(error.value)


@pytest.mark.parametrize(
    ("read", "make", "label", "wrong"),
    [
        (ade20k.read, ade, "annotations/validation/ADE_val_00000001.png", 151),
        (coco_stuff.read, stuff, "annotations/val2017/000000000139.png", 11),
        (voc_segmentation.read, voc, "SegmentationClass/2007_000033.png", 21),
        (cityscapes.read, city, "gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png", 34),
        (pascal_context.read, context, "SegmentationClassContext/2008_000002.png", 60),
    ],
)
def test_a_label_that_is_no_class_is_an_error(
    read: Callable[[Path], SegmentationData], make: Callable[[Path], Path], label: str, wrong: int, tmp_path: Path
) -> None:
    root = make(tmp_path)
    data = read(root)
    Image.fromarray(np.array([[1, wrong]], dtype=np.uint8)).save(root / label)
    with pytest.raises(BenchmarkError, match=f"{Path(label).name} has the labels {wrong}, which are none of"):
        data.labels(0)


def test_a_picture_in_place_of_a_label_map_is_an_error(tmp_path: Path) -> None:
    root = ade(tmp_path)
    data = ade20k.read(root)
    Image.new("RGB", (3, 2)).save(data.label_maps[0])
    with pytest.raises(BenchmarkError, match=r"ADE_val_00000001.png is no label map: it has colours \(mode RGB\)"):
        data.labels(0)
    data.label_maps[0].write_bytes(b"cut")
    with pytest.raises(DamagedImageError, match=r"ADE_val_00000001\.png"):
        data.labels(0)


def test_names_of_classes_are_distinct_and_as_many_as_published() -> None:
    for name, count in {"ade20k": 150, "coco-stuff": 171, "voc": 20, "pascal-context": 59, "cityscapes": 19}.items():
        assert len(set(segmentation_classes(name))) == count


def test_every_set_is_found_by_name_whole_and_in_windows() -> None:
    known = all_benchmarks()
    for name in ("ade20k", "coco-stuff", "voc20", "voc21", "cityscapes", "pascal-context59"):
        assert "dense" in known[name].groups
        assert known[f"{name}-sliding"].groups == ("dense",)
        assert known[f"{name}-sliding"].read is known[name].read


def test_grey_values_of_a_palette_are_not_its_colours(tmp_path: Path) -> None:
    """Conversion to grey would mix the colours of the palette."""
    data = voc_segmentation.read(voc(tmp_path))
    assert data.labels(0).equal(torch.tensor([[255, 0, 19, 255]]))
    assert np.array(Image.open(data.label_maps[0]).convert("L")).tolist() != [[0, 1, 20, 255]]
