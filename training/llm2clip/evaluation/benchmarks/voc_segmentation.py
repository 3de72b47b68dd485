"""Pascal VOC 2012 (Everingham et al.): 20 classes of objects, without and with their background."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from llm2clip.evaluation.benchmarks.base import Benchmark
from llm2clip.evaluation.benchmarks.label_maps import (
    IGNORED,
    SegmentationData,
    background_names,
    class_table,
    listed_files,
    segmentation_classes,
)
from llm2clip.evaluation.protocols.segmentation import MaskCLIPSegmentation, sliding

OBJECTS = 20


def read(folder: Path) -> SegmentationData:
    """Read the validation part, whose background (label 0) and outlines (255) do not count."""
    return _read(folder, "VOC20", segmentation_classes("voc"), class_table(range(1, OBJECTS + 1), (0, IGNORED)))


def read_with_background(folder: Path) -> SegmentationData:
    """Read the validation part with the background as class 0, which has five names; outlines do not count."""
    names = {"background": background_names(), **segmentation_classes("voc")}
    return _read(folder, "VOC21", names, class_table(range(OBJECTS + 1)))


def _read(folder: Path, title: str, names: dict[str, tuple[str, ...]], table: Tensor) -> SegmentationData:
    listing = folder / "ImageSets" / "Segmentation" / "val.txt"
    pairs = listed_files(title, listing, folder / "JPEGImages", folder / "SegmentationClass")
    return SegmentationData(title, *pairs, names, table)


VOC20 = Benchmark(
    name="voc20",
    title="VOC20",
    groups=("dense", "paper"),
    folder="VOCdevkit/VOC2012",
    marker="ImageSets/Segmentation/val.txt",
    more_markers=("SegmentationClass", "JPEGImages"),
    files="ImageSets/Segmentation/val.txt, JPEGImages/*.jpg, SegmentationClass/*.png",
    counts={"images": 1449, "classes": OBJECTS},
    license="images under Flickr's terms",
    source="host.robots.ox.ac.uk/pascal/VOC/voc2012 (VOCtrainval_11-May-2012.tar)",
    read=read,
    protocol=MaskCLIPSegmentation(),
    note="without background; the paper does not say whether its VOC has one, nor resolution and prompts",
)
VOC21 = replace(
    VOC20,
    name="voc21",
    title="VOC21",
    groups=("dense",),
    counts={"images": 1449, "classes": OBJECTS + 1},
    read=read_with_background,
    note="the background is the best of MaskCLIP's five names; other papers use a threshold or dozens of names",
)
BENCHMARKS = [VOC20, VOC21, sliding(VOC20), sliding(VOC21)]
