"""Cityscapes (Cordts et al., 2016): streets with 19 classes."""

from __future__ import annotations

from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark
from llm2clip.evaluation.benchmarks.label_maps import (
    IGNORED,
    SegmentationData,
    class_table,
    paired_files,
    segmentation_classes,
)
from llm2clip.evaluation.protocols.segmentation import MaskCLIPSegmentation, sliding

TITLE = "Cityscapes"
# The labels (`labelIds`) of the 19 classes that are evaluated, in the order of `labelTrainIds`; others of the 34 do
# not count.
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
LABELS = 34


def read(folder: Path) -> SegmentationData:
    """Read the validation part with the original `labelIds` maps."""
    images, labels = folder / "leftImg8bit" / "val", folder / "gtFine" / "val"
    pairs = paired_files(TITLE, images, labels, "_leftImg8bit.png", "_gtFine_labelIds.png")
    ignored = [label for label in range(LABELS) if label not in EVALUATED]
    table = class_table(EVALUATED, [*ignored, IGNORED])
    return SegmentationData(TITLE, *pairs, segmentation_classes("cityscapes"), table)


CITYSCAPES = Benchmark(
    name="cityscapes",
    title=TITLE,
    groups=("dense", "paper"),
    folder="cityscapes",
    marker="gtFine/val",
    more_markers=("leftImg8bit/val",),
    files="leftImg8bit/val/CITY/*_leftImg8bit.png, gtFine/val/CITY/*_gtFine_labelIds.png",
    counts={"images": 500, "classes": 19},
    license="own terms: research, no commercial use",
    source="cityscapes-dataset.com, after registration (leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip)",
    read=read,
    protocol=MaskCLIPSegmentation(scale=(2048, 1024)),
    note="8,192 patches of 16 pixels an image; the paper states neither resolution nor prompts",
)
BENCHMARKS = [CITYSCAPES, sliding(CITYSCAPES)]
