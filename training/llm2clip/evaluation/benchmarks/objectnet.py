"""ObjectNet: household objects from unusual views; the 113 classes that ImageNet has too."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.benchmarks.encoded_images import CroppedFiles
from llm2clip.evaluation.benchmarks.image_folder import labelled, read_class_folders
from llm2clip.evaluation.data import BenchmarkImages, ClassificationData
from llm2clip.evaluation.reading import read_json

BORDER = 2


def read_objectnet(folder: Path, border: int = 0) -> ClassificationData:
    """Read the images of the classes that ImageNet has too, under ObjectNet's names in lower case.

    Args:
        border: Pixels that are cut off on each side. A red border of 2 pixels marks the images as test images.
    """
    mappings = folder / "mappings"
    labels, shared = (
        read_json(mappings / name) for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
    )
    classes = sorted(name for name, label in labels.items() if label in shared)
    paths, found = read_class_folders("ObjectNet", folder / "images", classes, ignored=labels)
    data = labelled(paths, found, [labels[name].lower() for name in classes])
    if border:
        data.images = BenchmarkImages(
            CroppedFiles(paths, border), [f"{path.parent.name}/{path.name}" for path in paths]
        )
    return data


def _benchmark(name: str, title: str, border: int, note: str) -> Benchmark:
    return Benchmark(
        name=name, title=title, groups=("classification",), folder="objectnet-1.0",
        needs=("mappings/objectnet_to_imagenet_1k.json",),
        files="objectnet-1.0/images/FOLDER/*.png and objectnet-1.0/mappings/*.json.",
        counts={"images": 18574, "classes": 113}, license="CC BY 4.0; not to be trained on", source="objectnet.dev",
        read=partial(read_objectnet, border=border), protocol="zero-shot-classification", note=note,
    )  # fmt: skip


BENCHMARKS = [
    _benchmark("objectnet", "ObjectNet", 0, "With the red border of 2 pixels, as CLIP_benchmark."),
    _benchmark(
        "objectnet-cropped", "ObjectNet, cropped", BORDER, "Without the red border, as its authors: other numbers."
    ),
]
