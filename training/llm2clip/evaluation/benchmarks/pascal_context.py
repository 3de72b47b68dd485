"""Pascal Context (Mottaghi et al., 2014) with its 59 frequent classes."""

from __future__ import annotations

from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark
from llm2clip.evaluation.benchmarks.label_maps import (
    IGNORED,
    SegmentationData,
    class_table,
    listed_files,
    segmentation_classes,
)
from llm2clip.evaluation.protocols.segmentation import MaskCLIPSegmentation, sliding

TITLE = "Pascal Context 59"
CLASSES = 59


def read(folder: Path) -> SegmentationData:
    """Read the validation part as mmsegmentation converts it; its background (label 0) does not count."""
    listing = folder / "ImageSets" / "SegmentationContext" / "val.txt"
    pairs = listed_files(TITLE, listing, folder / "JPEGImages", folder / "SegmentationClassContext")
    table = class_table(range(1, CLASSES + 1), (0, IGNORED))
    return SegmentationData(TITLE, *pairs, segmentation_classes("pascal-context"), table)


PASCAL_CONTEXT = Benchmark(
    name="pascal-context59",
    title=TITLE,
    groups=("dense",),
    folder="VOCdevkit/VOC2010",
    marker="ImageSets/SegmentationContext/val.txt",
    more_markers=("SegmentationClassContext", "JPEGImages"),
    files="ImageSets/SegmentationContext/val.txt, JPEGImages/*.jpg, SegmentationClassContext/*.png",
    counts={"images": 5104, "classes": CLASSES},
    license="images under Flickr's terms",
    source="host.robots.ox.ac.uk/pascal/VOC/voc2010 (images), trainval_merged.json of the Detail API (labels)",
    read=read,
    protocol=MaskCLIPSegmentation(scale=(520, 520)),
    note="the files of mmsegmentation's pascal_context.py; early versions of it list the classes in another order",
)
BENCHMARKS = [PASCAL_CONTEXT, sliding(PASCAL_CONTEXT)]
