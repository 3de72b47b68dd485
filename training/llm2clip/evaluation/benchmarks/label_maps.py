"""Images with the class of every pixel: folders of label maps, and the names of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm2clip.evaluation.benchmarks.base import BenchmarkError
from llm2clip.evaluation.benchmarks.data import BenchmarkImages
from llm2clip.evaluation.benchmarks.files import class_data, read_lines
from llm2clip.utils.logs import shortened
from modeling_llm2clip.image_decoding_llm2clip import decoding_errors, open_image

# The class of pixels that do not count, and of values that are no class at all.
IGNORED = 255
REFUSED = -1
# Grey levels, or a palette, whose indices are the labels and whose colours mean nothing.
LABEL_MODES = ("L", "P")


@dataclass
class SegmentationData:
    """Images whose every pixel has a class.

    Attributes:
        title: Name of the set in messages.
        label_maps: PNG file of each image, of its size.
        classes: Names of each class in prompts, by the name of the class, in the order of the classes. A class of
            several names, such as a background, is as similar as the most similar of them.
        class_of: `(256,)` int64, the class of each value in a file, `IGNORED`, or `REFUSED` for a wrong one.
    """

    title: str
    images: BenchmarkImages
    label_maps: list[Path]
    classes: dict[str, tuple[str, ...]]
    class_of: Tensor

    def counts(self) -> dict[str, int]:
        """Numbers of images and classes."""
        return {"images": len(self.images), "classes": len(self.classes)}

    def labels(self, row: int) -> Tensor:
        """Read the classes of the pixels of an image, `(height, width)` int64, with `IGNORED` for none.

        Raises:
            BenchmarkError: The file is no label map, or a value in it is no class.
            DamagedImageError: The file cannot be decoded.
        """
        path = self.label_maps[row]
        with decoding_errors(path, str(path)):
            picture = open_image(path)
            values = torch.from_numpy(np.array(picture))
        if picture.mode not in LABEL_MODES:
            raise BenchmarkError(f"{path} is no label map: it has colours (mode {picture.mode}) instead of labels.")
        classes = self.class_of[values.long()]
        wrong = values[classes == REFUSED].unique().tolist()
        if wrong:
            raise BenchmarkError(
                f"{path} has the labels {shortened([str(value) for value in wrong])}, which are none of {self.title}."
            )
        return classes


def class_table(values: Sequence[int], ignored: Sequence[int] = (IGNORED,)) -> Tensor:
    """Make the table of `SegmentationData.class_of` from the value of each class, and the values of no class."""
    table = torch.full((256,), REFUSED)
    table[list(values)] = torch.arange(len(values))
    table[list(ignored)] = IGNORED
    return table


def paired_files(
    title: str, images: Path, labels: Path, image_end: str, label_end: str, other_labels: str | None = None
) -> tuple[BenchmarkImages, list[Path]]:
    """Pair all images below one folder with the label maps below another by their paths without the ends.

    Args:
        title: The benchmark, in messages.
        image_end, label_end: Ends of the file names, such as `_leftImg8bit.png`.
        other_labels: End of other files among the label maps.

    Returns:
        Images and label maps, in the order of their paths.

    Raises:
        BenchmarkError: An image has no label map or the reverse; the message names the files.
    """
    found = [
        {str(path.relative_to(folder).as_posix()).removesuffix(end): path for path in folder.rglob(f"*{end}")}
        for folder, end in ((images, image_end), (labels, label_end))
    ]
    of_images, of_labels = found
    if other_labels is not None:
        of_labels = {name: path for name, path in of_labels.items() if not path.name.endswith(other_labels)}
    lacking = [str(labels / f"{name}{label_end}") for name in sorted(of_images.keys() - of_labels.keys())]
    lacking += [str(images / f"{name}{image_end}") for name in sorted(of_labels.keys() - of_images.keys())]
    return _complete(
        title, lacking, [(of_images[name], of_labels[name]) for name in sorted(of_images.keys() & of_labels.keys())]
    )


def listed_files(title: str, listing: Path, images: Path, labels: Path) -> tuple[BenchmarkImages, list[Path]]:
    """Pair the images and label maps of a list of names, one a line, as the sets of Pascal VOC are distributed.

    Raises:
        BenchmarkError: A file is missing; the message names it.
    """
    names = [line.strip() for line in read_lines(listing) if line.strip()]
    pairs = [(images / f"{name}.jpg", labels / f"{name}.png") for name in names]
    return _complete(title, [str(path) for pair in pairs for path in pair if not path.is_file()], pairs)


def _complete(
    title: str, lacking: list[str], pairs: Sequence[tuple[Path, Path]]
) -> tuple[BenchmarkImages, list[Path]]:
    if lacking:
        raise BenchmarkError(f"{title} lacks {len(lacking):,} images or label maps: {shortened(lacking)}.")
    return BenchmarkImages([image for image, _ in pairs]), [label for _, label in pairs]


def segmentation_classes(name: str) -> dict[str, tuple[str, ...]]:
    """Return MaskCLIP's name of each class of a set, in the order of its labels, as `SegmentationData.classes`."""
    return {name: (name,) for name in class_data("segmentation")["classes"][name]}


def background_names() -> tuple[str, ...]:
    """Return the names with which MaskCLIP finds what is no class."""
    return tuple(class_data("segmentation")["background"])


def scene_templates() -> list[str]:
    """Return the five templates that MaskCLIP adds to OpenAI's 80."""
    return list(class_data("segmentation")["templates"])
