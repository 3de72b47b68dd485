"""Readers of segmentation sets, on tiny folders in the layouts of the originals; values are written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.prompts import class_data
from llm2clip.evaluation.segmentation_data import IGNORED, SegmentationData
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError


@dataclass
class Layout:
    """A tiny set, with what its reader makes of it."""

    root: str
    image: str  # paths, with a place for the name
    label: str
    written: dict[str, list[list[int]]]  # values in the label map of each name
    read: list[list[list[int]]]  # classes, in the order of the images
    names: dict[int, str]  # some of the classes
    classes: tuple[str, int]  # their name, and how many there are
    wrong: int  # a value that is no class
    order: tuple[str, ...] = ()  # names in the order of the images; by default all that are written
    listing: str = ""  # where a list of names lies, if the set has one
    beside: tuple[str, ...] = ()  # other files beside a label map

    def write(self, data: Path) -> Path:
        """Write the set below a folder; returns its own."""
        root = data / self.root
        for name, values in self.written.items():
            array = np.array(values, dtype=np.uint8)
            image, label = (root / place.format(name) for place in (self.image, self.label))
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", array.shape[::-1], (1, 2, 3)).save(image)
            picture = Image.fromarray(array)
            if "SegmentationClass/" in self.label:
                picture.putpalette([channel for level in range(256) for channel in (255 - level, level, 7)])
                assert picture.mode == "P"
            picture.save(label)
            for other in self.beside:
                Image.new("L", array.shape[::-1], 3).save(root / other.format(name))
        if self.listing:
            (root / self.listing).parent.mkdir(parents=True)
            (root / self.listing).write_text("".join(f"{name}\n" for name in self.order))
        return root


VOC = Layout(
    "VOCdevkit/VOC2012", "JPEGImages/{}.jpg", "SegmentationClass/{}.png",
    {"2007_000033": [[0, 1, 20, 255]], "2007_000032": [[15]], "2007_000042": [[19]]},
    [[[255, 0, 19, 255]], [[14]]], {0: "airplane", 14: "person", 19: "tv monitor"}, ("voc", 20), 21,
    ("2007_000033", "2007_000032"), "ImageSets/Segmentation/val.txt",
)  # fmt: skip
SETS = {
    "ade20k": Layout(
        "ADEChallengeData2016", "images/{}.jpg", "annotations/{}.png",
        {"validation/ADE_2": [[150, 0]], "validation/ADE_1": [[0, 1, 2], [13, 150, 255]], "training/ADE_1": [[1]]},
        [[[255, 0, 1], [12, 149, 255]], [[149, 255]]], {0: "wall", 7: "bed ", 12: "person", 149: "flag"},
        ("ade20k", 150), 151, ("validation/ADE_1", "validation/ADE_2"),
    ),
    "coco-stuff": Layout(
        "coco_stuff164k", "images/val2017/{}.jpg", "annotations/val2017/{}.png",
        {"000000000139": [[0, 10, 12, 89], [91, 181, 255, 255]]}, [[[0, 10, 11, 79], [80, 170, 255, 255]]],
        {0: "person", 10: "fire hydrant", 11: "stop sign", 79: "toothbrush", 80: "banner", 170: "wood"},
        # What mmsegmentation's converter leaves beside it.
        ("coco-stuff", 171), 11, beside=("annotations/val2017/{}_labelTrainIds.png",),
    ),
    "voc20": VOC,
    "voc21": Layout(
        VOC.root, VOC.image, VOC.label, VOC.written, [[[0, 1, 20, 255]], [[15]]],
        {0: "background", 1: "airplane", 15: "person"}, ("voc", 20), 21, VOC.order, VOC.listing,
    ),
    "cityscapes": Layout(
        "cityscapes", "leftImg8bit/val/{}_leftImg8bit.png", "gtFine/val/{}_gtFine_labelIds.png",
        {"munster/munster_000000_000019": [[7, 8, 26], [33, 0, 9]], "frankfurt/f_294": [[11, 23, 31], [28, 29, 4]]},
        [[[2, 10, 16], [15, 255, 255]], [[0, 1, 13], [18, 255, 255]]],
        {0: "road", 1: "sidewalk", 2: "building", 10: "sky", 13: "car", 15: "bus", 16: "train", 18: "bicycle"},
        ("cityscapes", 19), 34, ("frankfurt/f_294", "munster/munster_000000_000019"),
        beside=tuple(f"gtFine/val/{{}}_gtFine_{kind}.png" for kind in ("instanceIds", "labelTrainIds", "color")),
    ),
    "pascal-context59": Layout(
        "VOCdevkit/VOC2010", "JPEGImages/{}.jpg", "SegmentationClassContext/{}.png",
        {"2008_000002": [[0, 1, 2, 59]]}, [[[255, 0, 1, 58]]], {0: "airplane", 1: "bag", 58: "wood"},
        ("pascal-context", 59), 60, ("2008_000002",), "ImageSets/SegmentationContext/val.txt",
    ),
}  # fmt: skip
every_set = pytest.mark.parametrize("name", SETS)


@every_set
def test_labels_are_the_classes_of_the_set(name: str, tmp_path: Path) -> None:
    benchmark, layout = all_benchmarks()[name], SETS[name]
    assert benchmark.find(tmp_path) is None
    root = layout.write(tmp_path)
    folder = benchmark.find(tmp_path)
    assert folder == root == benchmark.find(root)
    data: SegmentationData = benchmark.read(folder)
    assert [data.labels(row).tolist() for row in range(len(data.images))] == layout.read
    order = layout.order or tuple(layout.written)
    assert data.images.images == [root / layout.image.format(name) for name in order]
    assert data.label_maps == [root / layout.label.format(name) for name in order]
    classes = list(data.classes)
    assert {number: classes[number] for number in layout.names} == layout.names
    assert data.counts() == {"images": len(layout.read), "classes": benchmark.counts["classes"]}
    assert max(data.class_of[data.class_of != IGNORED].tolist()) + 1 == benchmark.counts["classes"]
    names, count = layout.classes
    assert len(set(class_data("segmentation")["classes"][names])) == count


@every_set
def test_a_label_that_is_no_class_is_an_error(name: str, tmp_path: Path) -> None:
    data = all_benchmarks()[name].read(SETS[name].write(tmp_path))
    path = data.label_maps[0]
    Image.fromarray(np.array([[1, SETS[name].wrong]], dtype=np.uint8)).save(path)
    with pytest.raises(BenchmarkError, match=f"{path.name} has the labels {SETS[name].wrong}, which are none of"):
        data.labels(0)


@every_set
@pytest.mark.parametrize("lost", ["image", "label"])
def test_missing_files_are_named(lost: str, name: str, tmp_path: Path) -> None:
    layout = SETS[name]
    root = layout.write(tmp_path)
    path = root / getattr(layout, lost).format((layout.order or tuple(layout.written))[-1])
    path.unlink()
    with pytest.raises(BenchmarkError, match="lacks 1 of") as error:
        all_benchmarks()[name].read(root)
    assert str(path) in str(error.value)


def test_the_background_of_voc21_has_five_names(tmp_path: Path) -> None:
    data = all_benchmarks()["voc21"].read(VOC.write(tmp_path))
    assert data.classes["background"] == ("building", "ground", "grass", "tree", "sky")
    assert data.classes["airplane"] == ("airplane",)


def test_a_picture_in_place_of_a_label_map_is_an_error(tmp_path: Path) -> None:
    data = all_benchmarks()["ade20k"].read(SETS["ade20k"].write(tmp_path))
    Image.new("RGB", (3, 2)).save(data.label_maps[0])
    with pytest.raises(BenchmarkError, match=r"ADE_1.png is no label map: it has colours \(mode RGB\)"):
        data.labels(0)
    data.label_maps[0].write_bytes(b"cut")
    with pytest.raises(DamagedImageError, match=r"ADE_1\.png"):
        data.labels(0)
