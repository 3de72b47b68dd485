"""ADE20K (Zhou et al., 2017): scenes with 150 classes, as in the SceneParsing challenge of 2016."""

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

TITLE = "ADE20K"
CLASSES = 150


def read(folder: Path) -> SegmentationData:
    """Read the validation part. Label 0 is of no class (`reduce_zero_label`), so that class 0 has label 1."""
    images, labels = folder / "images" / "validation", folder / "annotations" / "validation"
    pairs = paired_files(TITLE, images, labels, ".jpg", ".png")
    table = class_table(range(1, CLASSES + 1), (0, IGNORED))
    return SegmentationData(TITLE, *pairs, segmentation_classes("ade20k"), table)


ADE20K = Benchmark(
    name="ade20k",
    title=TITLE,
    groups=("dense", "paper"),
    folder="ADEChallengeData2016",
    marker="annotations/validation",
    more_markers=("images/validation",),
    files="images/validation/ADE_val_*.jpg, annotations/validation/ADE_val_*.png",
    counts={"images": 2000, "classes": CLASSES},
    license="annotations BSD-3-Clause; images for research",
    source="sceneparsing.csail.mit.edu (ADEChallengeData2016.zip)",
    read=read,
    protocol=MaskCLIPSegmentation(),
    note="the paper states neither resolution nor prompts: its numbers tell differences only",
)
BENCHMARKS = [ADE20K, sliding(ADE20K)]
