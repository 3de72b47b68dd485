"""Images with a class for every pixel: Pascal VOC and Context, ADE20K, COCO-Stuff, Cityscapes; whole or in windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.data import BenchmarkImages
from llm2clip.evaluation.prompts import class_data
from llm2clip.evaluation.reading import read_lines
from llm2clip.evaluation.segmentation_data import IGNORED, REFUSED, SegmentationData

BACKGROUND = "background"
# Ids of COCO minus 1, from 0 to 181, for which there is no annotation.
STUFF_MISSING = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
# The labels (`labelIds`) of the 19 classes of Cityscapes that are evaluated, in the order of `labelTrainIds`; others
# of the 34 do not count.
CITY_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITY_IGNORED = tuple(label for label in range(34) if label not in CITY_EVALUATED)

# Image and label map of each row.
Pairs = list[tuple[Path, Path]]


def read_label_maps(
    title: str, pairs: Callable[[Path], Pairs], classes: str, table: Tensor, folder: Path, background: bool = False
) -> SegmentationData:
    """Read the validation part of a set.

    Args:
        title: The set, in messages.
        pairs: Finds the images and label maps.
        classes: The set whose names of classes MaskCLIP gives, in the order of the labels.
        table: Class of each value, see [`class_table`].
        background: Class 0 is the background, which has five names.

    Raises:
        BenchmarkError: An image has no label map or the reverse; the message names the files.
    """
    images, label_maps = zip(*pairs(folder), strict=True)
    BenchmarkImages(label_maps).require_files(f"{title} (label maps)")
    names = {BACKGROUND: tuple(class_data("segmentation")[BACKGROUND])} if background else {}
    names |= {name: (name,) for name in class_data("segmentation")["classes"][classes]}
    return SegmentationData(title, BenchmarkImages(list(images)).require_files(title), list(label_maps), names, table)


def class_table(values: Sequence[int], ignored: Sequence[int] = (IGNORED,)) -> Tensor:
    """Make the table of `SegmentationData.class_of` from the value of each class, and the values of no class."""
    table = torch.full((256,), REFUSED)
    table[list(values)] = torch.arange(len(values))
    table[list(ignored)] = IGNORED
    return table


def from_one(classes: int) -> Tensor:
    """Make the table of classes whose values begin with 1; 0 is of no class (`reduce_zero_label`)."""
    return class_table(range(1, classes + 1), (0, IGNORED))


def paired_files(images: str, labels: str, ends: tuple[str, str], other: str, folder: Path) -> Pairs:
    """Pair all images below a folder with the label maps below another by their paths without the ends.

    Args:
        images, labels: The two folders.
        ends: Ends of the names of images and of label maps, such as `_leftImg8bit.png`.
        other: End of other files among the label maps, or empty.

    Returns:
        The pairs in the order of the paths; one of the two files may not be there.
    """
    names: set[str] = set()
    for subfolder, end in zip((images, labels), ends, strict=True):
        paths = [path for path in (folder / subfolder).rglob(f"*{end}") if not (other and path.name.endswith(other))]
        names |= {path.relative_to(folder / subfolder).as_posix().removesuffix(end) for path in paths}
    return [(folder / images / f"{name}{ends[0]}", folder / labels / f"{name}{ends[1]}") for name in sorted(names)]


def listed_files(listing: str, labels: str, folder: Path) -> Pairs:
    """Pair the images and label maps of a list of names, one a line, as the sets of Pascal VOC are distributed."""
    names = [line.strip() for line in read_lines(folder / listing) if line.strip()]
    return [(folder / "JPEGImages" / f"{name}.jpg", folder / labels / f"{name}.png") for name in names]


def _pairs(images: str, labels: str, ends: tuple[str, str] = (".jpg", ".png"), other: str = "") -> dict[str, Any]:
    """Return what has to be there of a set with two folders, and how its files are paired."""
    return {"needs": (labels, images), "pairs": partial(paired_files, images, labels, ends, other)}


def _voc(part: str) -> dict[str, Any]:
    """Return the same of a set that is distributed as Pascal VOC is."""
    listing, labels = f"ImageSets/Segmentation{part}/val.txt", f"SegmentationClass{part}"
    return {
        "needs": (listing, labels, "JPEGImages"),
        "pairs": partial(listed_files, listing, labels),
        "files": f"{listing}, JPEGImages/*.jpg, {labels}/*.png",
    }


def _set(
    name: str, title: str, pairs: Callable[[Path], Pairs], classes: str, table: Tensor, images: int,
    background: bool = False, paper: bool = True, **fields: Any,
) -> list[Benchmark]:  # fmt: skip
    """Make the benchmark of a set, and the one in windows."""
    whole = Benchmark(
        name=name, title=title, groups=("dense", "paper") if paper else ("dense",),
        counts={"images": images, "classes": int(table[table != IGNORED].max()) + 1},
        read=partial(read_label_maps, title, pairs, classes, table, background=background),
        protocol="maskclip-segmentation", **fields,
    )  # fmt: skip
    # SAIL's protocol (CVPR 2025), as GroupViT's and TCL's before.
    sliding = replace(
        whole,
        name=f"{name}-sliding",
        title=f"{title}, windows",
        groups=("dense",),
        options={"scale": (2048, 448), "crop": 448, "stride": 224},
        note="SAIL's protocol: shorter side 448 pixels, windows of 448 every 224",
    )
    return [whole, sliding]


_voc2012 = partial(
    _set, classes="voc", images=1449, folder="VOCdevkit/VOC2012", license="images under Flickr's terms",
    source="host.robots.ox.ac.uk/pascal/VOC/voc2012 (VOCtrainval_11-May-2012.tar)", **_voc(""),
)  # fmt: skip
BENCHMARKS = [
    *_set(
        name="ade20k", title="ADE20K", **_pairs("images/validation", "annotations/validation"), classes="ade20k",
        table=from_one(150), images=2000, folder="ADEChallengeData2016",
        files="images/validation/ADE_val_*.jpg, annotations/validation/ADE_val_*.png",
        license="annotations BSD-3-Clause; images for research",
        source="sceneparsing.csail.mit.edu (ADEChallengeData2016.zip)",
        note="the paper states neither resolution nor prompts: its numbers tell differences only",
    ),
    *_set(
        name="cityscapes", title="Cityscapes",
        **_pairs("leftImg8bit/val", "gtFine/val", ("_leftImg8bit.png", "_gtFine_labelIds.png")), classes="cityscapes",
        table=class_table(CITY_EVALUATED, (*CITY_IGNORED, IGNORED)), images=500, options={"scale": (2048, 1024)},
        folder="cityscapes", files="leftImg8bit/val/CITY/*_leftImg8bit.png, gtFine/val/CITY/*_gtFine_labelIds.png",
        license="own terms: research, no commercial use",
        source="cityscapes-dataset.com, after registration (leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip)",
        note="8,192 patches of 16 pixels an image; the paper states neither resolution nor prompts",
    ),
    # The maps that mmsegmentation writes beside the original ones are left out.
    *_set(
        name="coco-stuff", title="COCO-Stuff 164k",
        **_pairs("images/val2017", "annotations/val2017", other="TrainIds.png"), classes="coco-stuff",
        table=class_table([label for label in range(182) if label not in STUFF_MISSING]), images=5000,
        folder="coco_stuff164k",
        files="images/val2017/*.jpg, annotations/val2017/*.png (stuffthingmaps_trainval2017.zip)",
        license="annotations CC BY 4.0; images under Flickr's terms",
        source="github.com/nightrome/cocostuff (label maps), cocodataset.org (images)",
        note="the 10k version has other labels; the paper states neither resolution nor prompts",
    ),
    # As mmsegmentation converts it.
    *_set(
        name="pascal-context59", title="Pascal Context 59", **_voc("Context"), classes="pascal-context",
        table=from_one(59), images=5104, paper=False, options={"scale": (520, 520)}, folder="VOCdevkit/VOC2010",
        license="images under Flickr's terms",
        source="host.robots.ox.ac.uk/pascal/VOC/voc2010 (images), trainval_merged.json of the Detail API (labels)",
        note="the files of mmsegmentation's pascal_context.py; early versions of it list the classes in another order",
    ),
    *_voc2012(
        name="voc20", title="VOC20", table=from_one(20),
        note="without background; the paper does not say whether its VOC has one, nor resolution and prompts",
    ),
    *_voc2012(
        name="voc21", title="VOC21", table=class_table(range(21)), background=True, paper=False,
        note="the background is the best of MaskCLIP's five names; other papers use a threshold or dozens of names",
    ),
]  # fmt: skip
