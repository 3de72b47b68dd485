r"""Sets in the form of CLIP_benchmark: tars of images with labels or captions, numbered from 0.

`SPLIT/nshards.txt` says how many tars there are. A sample's files share a key: `s0000000.webp` with `s0000000.cls`, a
label, or `s0000000.txt`, captions by line in which `\n` stands for the end of a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks.encoded_images import ArchivedImages, FilePart, list_tar
from llm2clip.evaluation.benchmarks.image_folder import labelled
from llm2clip.evaluation.data import BenchmarkImages, ClassificationData, RetrievalData
from llm2clip.evaluation.prompts import read_names, read_templates
from llm2clip.evaluation.reading import read_text

# In CLIP_benchmark's order of preference.
IMAGES = ("webp", "png", "jpg", "jpeg")
TYPE, CLASSNAMES, TEMPLATES = "dataset_type.txt", "classnames.txt", "zeroshot_classification_templates.txt"
FILE = re.compile(r"(?P<key>(?:.*/)?[^./]*)\.?(?P<suffix>.*)", re.DOTALL)
T = TypeVar("T")


class Webdataset(BaseModel):
    """How a set in this form is read.

    Attributes:
        answer: `txt`, captions, or `cls`, a label; the names of the classes are in `classnames.txt`, and the templates
            in `zeroshot_classification_templates.txt` if the set has its own.
        first: Captions of each image that are taken; None for all.
        mean_per_class: The accuracy that is compared is the mean of the classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal["webdataset"]
    answer: Literal["txt", "cls"]
    first: int | None = None
    mean_per_class: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The files that have to be there."""
        return ("test/nshards.txt", TYPE if self.answer == "txt" else CLASSNAMES)

    @property
    def train_needs(self) -> tuple[str, ...]:
        """Those of train images, which only sets of classification have."""
        return () if self.answer == "txt" else ("train/nshards.txt",)

    def read(self, folder: Path, with_train: bool = False) -> RetrievalData | ClassificationData:
        """Read the test images with their captions or labels and, for a probe, the train images."""
        _require_kind(folder, "retrieval" if self.answer == "txt" else "classification")
        if self.answer == "txt":
            return self._read_captions(folder)
        data = _read_split(folder, "test")
        data.mean_per_class = self.mean_per_class
        if with_train:
            data.train = _read_split(folder, "train")
        return data

    def _read_captions(self, folder: Path) -> RetrievalData:
        r"""Read the captions.

        CLIP_benchmark leaves `\n` in captions as it stands; here it is the end of a line again, which it was written
        for.
        """
        images, keys, captions = _read_samples(folder / "test", "txt", _captions)
        return RetrievalData.from_captions(BenchmarkImages(images, keys), [texts[: self.first] for texts in captions])


def _read_split(folder: Path, split: str) -> ClassificationData:
    images, keys, labels = _read_samples(folder / split, "cls", lambda content: int(content.decode()))
    data = labelled(images, labels, read_names(folder / CLASSNAMES), keys)
    if (folder / TEMPLATES).is_file():
        data.templates = read_templates(folder / TEMPLATES)
    return data


def _captions(content: bytes) -> list[str]:
    return [line.replace(r"\n", "\n") for line in content.decode("utf-8").split("\n")]


def _require_kind(folder: Path, kind: str) -> None:
    declared = read_text(folder / TYPE).strip().lower() if (folder / TYPE).is_file() else "classification"
    # Other words for classification do not matter.
    if (declared if declared in ("retrieval", "multilabel") else "classification") != kind:
        raise BenchmarkError(
            f"{folder} is a set of {declared}, not of {kind}: webdataset reads sets of classification, "
            "webdataset-retrieval those of retrieval; those of several labels an image have no protocol here."
        )


def _read_samples(folder: Path, answer: str, parse: Callable[[bytes], T]) -> tuple[ArchivedImages, list[str], list[T]]:
    """Read the answers of all samples, and where their images are, in the order of the tars."""
    images, keys, answers = [], [], []
    for number in range(int(read_text(folder / "nshards.txt"))):
        path = folder / f"{number}.tar"
        for key, files in _samples(path):
            suffixes = [suffix for suffix in IMAGES if suffix in files]
            if not suffixes or answer not in files:
                raise BenchmarkError(
                    f"sample {key} of {path} needs an image ({', '.join(IMAGES)}) and a .{answer}, "
                    f"but has {', '.join(f'.{suffix}' for suffix in files)}."
                )
            answers.append(parse(files[answer].read()))
            images.append(files[suffixes[0]])
            keys.append(f"{path.name}/{key}")
    return ArchivedImages(images), keys, answers


def _samples(path: Path) -> Iterator[tuple[str, dict[str, FilePart]]]:
    """Group the files of a tar by key, the name up to the first dot; files of a key follow each other."""
    parts = ((FILE.fullmatch(name), part) for name, part in list_tar(path))
    named = ((match["key"], match["suffix"].lower(), part) for match, part in parts if match is not None)
    for key, files in groupby(named, itemgetter(0)):
        yield key, {suffix: part for _, suffix, part in files}
