"""COCO-Stuff 164k (Caesar et al., 2018): val2017 with 80 classes of things and 91 of stuff."""

from __future__ import annotations

from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark
from llm2clip.evaluation.benchmarks.label_maps import (
    SegmentationData,
    class_table,
    paired_files,
    segmentation_classes,
)
from llm2clip.evaluation.protocols.segmentation import MaskCLIPSegmentation, sliding

TITLE = "COCO-Stuff 164k"
# Ids of COCO minus 1, from 0 to 181, for which there is no annotation.
MISSING = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)


def read(folder: Path) -> SegmentationData:
    """Read val2017 with the original label maps; those that mmsegmentation writes beside them are left out."""
    images, labels = folder / "images" / "val2017", folder / "annotations" / "val2017"
    pairs = paired_files(TITLE, images, labels, ".jpg", ".png", "TrainIds.png")
    table = class_table([label for label in range(182) if label not in MISSING])
    return SegmentationData(TITLE, *pairs, segmentation_classes("coco-stuff"), table)


COCO_STUFF = Benchmark(
    name="coco-stuff",
    title=TITLE,
    groups=("dense", "paper"),
    folder="coco_stuff164k",
    marker="annotations/val2017",
    more_markers=("images/val2017",),
    files="images/val2017/*.jpg, annotations/val2017/*.png (stuffthingmaps_trainval2017.zip)",
    counts={"images": 5000, "classes": 171},
    license="annotations CC BY 4.0; images under Flickr's terms",
    source="github.com/nightrome/cocostuff (label maps), cocodataset.org (images)",
    read=read,
    protocol=MaskCLIPSegmentation(),
    note="the 10k version has other labels; the paper states neither resolution nor prompts",
)
BENCHMARKS = [COCO_STUFF, sliding(COCO_STUFF)]
