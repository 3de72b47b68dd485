"""Readers of images in a folder for each class."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from llm2clip.command_line.logs import shortened
from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks.encoded_images import IMAGE_SUFFIXES
from llm2clip.evaluation.data import BenchmarkImages, ClassificationData
from llm2clip.evaluation.prompts import read_names, read_templates, template_set

logger = logging.getLogger(__name__)


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; hidden ones are left out."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """Return the images in a folder, sorted by name; hidden files and files of other kinds are left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def read_class_folders(
    title: str, folder: Path, classes: Sequence[str], ignored: Collection[str] = ()
) -> tuple[list[Path], list[int]]:
    """List the images of each class; classes without images are named in a warning, since the counts differ then.

    Args:
        classes: Name of the folder of each class, in the order of the labels.
        ignored: Folders that may be there and are no classes.

    Returns:
        Paths and labels, class by class.

    Raises:
        BenchmarkError: A folder is no class, or there is no image; the message names the folders.
    """
    folders = set(subfolders(folder))
    unknown = sorted(folders.difference(classes, ignored))
    if unknown:
        raise BenchmarkError(f"{title}: {folder} has {len(unknown)} folders of no class: {shortened(unknown)}.")
    files = {name: image_files(folder / name) if name in folders else [] for name in classes}
    empty = [name for name, paths in files.items() if not paths]
    if len(empty) == len(files):
        raise BenchmarkError(f"{title}: {folder} has no image in folders such as {shortened(empty[:3])}.")
    if empty:
        logger.warning("%s: %s has no image of %s classes: %s", title, folder, len(empty), shortened(empty))
    rows = [(path, label) for label, name in enumerate(classes) for path in files[name]]
    return [path for path, _ in rows], [label for _, label in rows]


def labelled(
    images: Sequence[Path | bytes],
    labels: Sequence[int],
    classnames: Sequence[str],
    names: Sequence[str] | None = None,
) -> ClassificationData:
    """Make data with OpenAI's templates for ImageNet, which CLIP_benchmark takes where a set has no own.

    Args:
        names: Names of the images in messages.
    """
    found = BenchmarkImages(images, names)
    return ClassificationData(
        found, torch.tensor(labels, dtype=torch.int64), list(classnames), template_set("openai-80")
    )


def read_image_folder(folder: Path, with_train: bool = False) -> ClassificationData:
    """Read `test/CLASS/*.jpg` and, for a probe, `train/CLASS/*.jpg` and `val/CLASS/*.jpg`.

    Labels are the ranks of the folders' names, as in torchvision, or of the numbers if all names are numbers: 2 comes
    before 10. `classnames.txt` has the names for prompts in that order; without it the folders' names are taken, with
    blanks for underscores. `templates.txt` has templates with `{c}`.

    Raises:
        BenchmarkError: There is no class, or `classnames.txt` has another number of names.
    """
    classes = subfolders(folder / "test")
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    if not classes:
        raise BenchmarkError(f"{folder / 'test'} has no folder of a class.")
    names = [name.replace("_", " ") for name in classes]
    if (folder / "classnames.txt").is_file():
        names = read_names(folder / "classnames.txt")
        if len(names) != len(classes):
            raise BenchmarkError(f"{folder / 'classnames.txt'} has {len(names)} names for {len(classes)} classes.")
    data = labelled(*read_class_folders("ImageFolder", folder / "test", classes), names)
    if (folder / "templates.txt").is_file():
        data.templates = read_templates(folder / "templates.txt")
    if with_train:
        paths, labels = read_class_folders("ImageFolder", folder / "train", classes)
        if (folder / "val").is_dir():
            more, of_more = read_class_folders("ImageFolder", folder / "val", classes)
            paths, labels = paths + more, labels + of_more
        data.train = labelled(paths, labels, names)
    return data
