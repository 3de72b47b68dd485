"""Readers of images with a class for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from llm2clip.evaluation.data import BenchmarkImages
from llm2clip.evaluation.prompts import class_data
from llm2clip.evaluation.reading import read_lines
from llm2clip.evaluation.segmentation_data import IGNORED, REFUSED, SegmentationData

BACKGROUND = "background"

# Image and label map of each row.
Pairs = list[tuple[Path, Path]]


def read_label_maps(
    folder: Path,
    title: str,
    classes: str,
    values: Sequence[int],
    ignored: Sequence[int] = (),
    missing: Sequence[int] = (),
    images: str = "",
    labels: str = "",
    ends: tuple[str, str] = (".jpg", ".png"),
    other: str = "",
    listing: str = "",
    background: bool = False,
) -> SegmentationData:
    """Read the validation part of a set: the images of a list, or all with label maps of the same path.

    Args:
        title: The set, in messages.
        classes: The set whose names of classes MaskCLIP gives, in the order of the labels.
        values: Value of the first class and of the last; those of `ignored` and `missing` between them are of none.
        ignored: Values of pixels that do not count, besides 255.
        missing: Values that no pixel has.
        images, labels: The two folders.
        ends: Ends of the names of images and of label maps, such as `_leftImg8bit.png`.
        other: End of other files among the label maps, or empty.
        listing: File of names, one a line, as the sets of Pascal VOC have it; or empty.
        background: Class 0 is the background, which has five names.

    Raises:
        BenchmarkError: An image has no label map or the reverse; the message names the files.
    """
    if listing:
        names = [line.strip() for line in read_lines(folder / listing) if line.strip()]
    else:
        names = _names(folder, (images, labels), ends, other)
    label_maps = [folder / labels / f"{name}{ends[1]}" for name in names]
    BenchmarkImages(label_maps).require_files(f"{title} (label maps)")
    found = BenchmarkImages([folder / images / f"{name}{ends[0]}" for name in names]).require_files(title)
    of_classes = [value for value in range(values[0], values[1] + 1) if value not in (*ignored, *missing)]
    names_of = {BACKGROUND: tuple(class_data("segmentation")[BACKGROUND])} if background else {}
    names_of |= {name: (name,) for name in class_data("segmentation")["classes"][classes]}
    return SegmentationData(title, found, label_maps, names_of, class_table(of_classes, ignored))


def class_table(values: Sequence[int], ignored: Sequence[int] = ()) -> Tensor:
    """Make the table of `SegmentationData.class_of` from the value of each class, and those that do not count."""
    table = torch.full((256,), REFUSED)
    table[list(values)] = torch.arange(len(values))
    table[[*ignored, IGNORED]] = IGNORED
    return table


def _names(folder: Path, parts: tuple[str, str], ends: tuple[str, str], other: str) -> list[str]:
    """Return the paths below one of the two folders, sorted, without their ends; one of the two may not be there."""
    names: set[str] = set()
    for part, end in zip(parts, ends, strict=True):
        paths = [path for path in (folder / part).rglob(f"*{end}") if not (other and path.name.endswith(other))]
        names |= {path.relative_to(folder / part).as_posix().removesuffix(end) for path in paths}
    return sorted(names)
