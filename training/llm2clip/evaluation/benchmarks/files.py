"""Finding the files of benchmarks: the first of several names, images by their names in a file of captions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from llm2clip.command_line.logs import shortened
from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.data import BenchmarkImages, RetrievalData


def first_file(folder: Path, names: Sequence[str]) -> Path:
    """Return the first of `names` that exists below a folder.

    Raises:
        BenchmarkError: None exists; the message names all.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise BenchmarkError(f"{folder} has no file {' or '.join(names)}.")


def find_images(title: str, folder: Path, names: Sequence[str], folders: Sequence[str] = ()) -> BenchmarkImages:
    """Find images by their paths in an annotation file.

    Archives are unpacked in many ways: an image that is not at its path is looked for in some folders, and then by its
    file name anywhere below `folder`.

    Args:
        title: The benchmark, in messages.
        names: Paths relative to `folder`.
        folders: Those, relative to `folder`, in which the file name alone is tried.

    Raises:
        BenchmarkError: Images are missing, or a file name is found twice; the message names them.
    """
    paths = [_at_a_path(folder, name, folders) for name in names]
    if None in paths:
        below = _files_by_name(folder, {Path(name).name for name, path in zip(names, paths, strict=True) if not path})
        twice = [f"{name} ({paths[0]}, {paths[1]})" for name, paths in below.items() if len(paths) > 1]
        if twice:
            raise BenchmarkError(f"{title}: several files have the name of one image: {shortened(twice)}.")
        paths = [
            path or next(iter(below.get(Path(name).name, [])), folder / name)
            for name, path in zip(names, paths, strict=True)
        ]
    return BenchmarkImages([path for path in paths if path is not None], names).require_files(title)


def captions_data(
    title: str,
    folder: Path,
    captions: Iterable[tuple[str, Sequence[str]]],
    folders: Sequence[str] = (),
    first: int | None = None,
) -> RetrievalData:
    """Find the images of captions.

    Args:
        title, folder, folders: See [`find_images`].
        captions: Path and captions of each image.
        first: Captions of each image that are taken; None for all.

    Raises:
        BenchmarkError: There is no caption, or images are missing.
    """
    rows = list(captions)
    if not rows:
        raise BenchmarkError(f"{title}: the file of captions below {folder} is empty.")
    images = find_images(title, folder, [name for name, _ in rows], folders)
    return RetrievalData.from_captions(images, [texts[:first] for _, texts in rows])


def _at_a_path(folder: Path, name: str, folders: Sequence[str]) -> Path | None:
    candidates = [folder / name, *(folder / subfolder / Path(name).name for subfolder in folders)]
    return next((path for path in candidates if path.is_file()), None)


def _files_by_name(folder: Path, wanted: set[str]) -> dict[str, list[Path]]:
    paths: dict[str, list[Path]] = {}
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in wanted.intersection(names):
            paths.setdefault(name, []).append(Path(root) / name)
    return paths
