"""Images whose every pixel has a class, in label maps: what the readers of segmentation sets return."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm2clip.command_line.logs import shortened
from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.data import BenchmarkImages, DataPart
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

    def parts(self) -> list[DataPart]:
        """Return the images, with their label maps."""
        return [DataPart(images=self.images, label_map=self.labels)]

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
