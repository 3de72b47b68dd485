"""Readers of ImageNet-1k and the sets with its classes: V2, A, R, O, Sketch; of ObjectNet, which has 113 of them."""

from __future__ import annotations

from pathlib import Path

from llm2clip.evaluation.benchmarks.encoded_images import CroppedFiles
from llm2clip.evaluation.benchmarks.image_folder import labelled, read_class_folders
from llm2clip.evaluation.data import ClassificationData
from llm2clip.evaluation.prompts import imagenet_classes, imagenet_subset
from llm2clip.evaluation.reading import read_json


def read_imagenet(
    folder: Path, images: str = "", subset: str | None = None, with_train: bool = False
) -> ClassificationData:
    """Read a set with a folder for each WordNet id, whose label is its rank.

    Args:
        images: The folder of these folders.
        subset: `a`, `r` or `o`, whose 200 classes are numbered on their own.
        with_train: Read the train images in `train` too, for a probe.
    """
    classes = imagenet_classes()
    wnids = list(classes) if subset is None else imagenet_subset(subset)
    names = [classes[wnid] for wnid in wnids]
    # Archives have other folders and files beside: a README, or `sketch/` around all.
    data = labelled(*read_class_folders(folder.name, folder / images, wnids), names)
    if with_train:
        data.train = labelled(*read_class_folders(folder.name, folder / "train", wnids), names)
    return data


def read_imagenet_v2(folder: Path, images: str) -> ClassificationData:
    """Read ImageNet-V2, whose folders are named after labels, `0` to `999`: sorted as text, 10 comes before 2."""
    names = list(imagenet_classes().values())
    labels = [str(label) for label in range(len(names))]
    return labelled(*read_class_folders("ImageNet-V2", folder / images, labels), names)


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
    paths, numbers = read_class_folders("ObjectNet", folder / "images", classes, ignored=labels)
    classnames = [labels[name].lower() for name in classes]
    if not border:
        return labelled(paths, numbers, classnames)
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    return labelled(CroppedFiles(paths, border), numbers, classnames, names)
