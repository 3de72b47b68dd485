r"""Sets in the form of CLIP_benchmark: tars of images with labels or captions, numbered from 0.

`SPLIT/nshards.txt` says how many tars there are. A sample's files share a key: `s0000000.webp` with `s0000000.cls`, a
label, or `s0000000.txt`, captions by line in which `\n` stands for the end of a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
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


def read_classification(folder: Path, with_train: bool = False, mean_per_class: bool = False) -> ClassificationData:
    """Read the test images with their labels and, for a probe, the train images."""
    _require_kind(folder, "classification")
    data = _read_split(folder, "test")
    data.mean_per_class = mean_per_class
    if with_train:
        data.train = _read_split(folder, "train")
    return data


def _read_split(folder: Path, split: str) -> ClassificationData:
    images, keys, labels = _read_samples(folder / split, "cls", lambda content: int(content.decode()))
    data = labelled(images, labels, read_names(folder / CLASSNAMES))
    data.images.names = keys
    if (folder / TEMPLATES).is_file():
        data.templates = read_templates(folder / TEMPLATES)
    return data


def read_retrieval(folder: Path) -> RetrievalData:
    r"""Read images with their captions.

    CLIP_benchmark leaves `\n` in captions as it stands; here it is the end of a line again, which it was written for.
    """
    _require_kind(folder, "retrieval")
    images, keys, captions = _read_samples(folder / "test", "txt", _captions)
    return RetrievalData.from_captions(BenchmarkImages(images, keys), captions)


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


# Folder, title, classes and test images (None where they were not verified), whether the mean per class is compared:
# the sets of classification beside ImageNet and CIFAR that ProCLIP's table has.
SETS = (
    ("food101", "Food-101", 101, 25250, False),
    ("sun397", "SUN397", 397, None, False),
    ("cars", "Stanford Cars", 196, 8041, False),
    ("fgvc_aircraft", "FGVC Aircraft", 100, 3333, True),
    ("vtab-dtd", "DTD", 47, 1880, False),
    ("vtab-pets", "Oxford Pets", 37, 3669, True),
    ("vtab-caltech101", "Caltech-101", 102, None, True),
    ("vtab-flowers", "Oxford Flowers", 102, 6149, True),
)


def _set(folder: str, title: str, classes: int, images: int | None, mean_per_class: bool) -> Benchmark:
    read = partial(read_classification, mean_per_class=mean_per_class)
    return Benchmark(
        name=folder.removeprefix("vtab-").replace("_", "-"), title=title, groups=("classification",),
        folder=f"wds_{folder}", needs=("./test/nshards.txt", CLASSNAMES),
        files=f"test/nshards.txt, test/*.tar, {CLASSNAMES}, {TEMPLATES}; train/ for probes.",
        counts={"classes": classes} | ({"images": images} if images else {}), license="see its page",
        source=f"huggingface.co/datasets/clip-benchmark/wds_{folder}", read=read, protocol="zero-shot-classification",
        note="The mean per class is compared." if mean_per_class else "",
        read_train=partial(read, with_train=True), train_needs=("train/nshards.txt",),
    )  # fmt: skip


_webdataset = partial(Benchmark, title="webdataset", folder="webdataset", license="see its page")
BENCHMARKS = [
    _webdataset(
        name="webdataset",
        needs=("test/nshards.txt", CLASSNAMES),
        files=f"test/nshards.txt, test/*.tar, {CLASSNAMES}; {TEMPLATES} if wanted; train/ for probes.",
        source="any set of huggingface.co/clip-benchmark, or clip_benchmark_export_wds",
        read=read_classification,
        protocol="zero-shot-classification",
        read_train=partial(read_classification, with_train=True),
        train_needs=("train/nshards.txt",),
    ),
    _webdataset(
        name="webdataset-retrieval",
        needs=("test/nshards.txt", TYPE),
        files=f"test/nshards.txt, test/*.tar, {TYPE} with the word retrieval.",
        source="any set of huggingface.co/clip-benchmark, or clip_benchmark_export_wds --retrieval",
        read=read_retrieval,
        protocol="retrieval",
    ),
    *(_set(*row) for row in SETS),
]
