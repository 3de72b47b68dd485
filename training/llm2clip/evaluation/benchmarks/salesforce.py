"""Annotation files of Salesforce (ALBEF, BLIP), which LLM2CLIP reads: `[{"image": path, "caption": [texts]}]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm2clip.evaluation.benchmarks.data import RetrievalData
from llm2clip.evaluation.benchmarks.files import find_images, json_rows, read_json, text_field, texts_field


def read_salesforce(
    title: str, folder: Path, file: Path, first: int | None = None, places: Sequence[str] = ()
) -> RetrievalData:
    """Read an annotation file and find its images.

    Args:
        title: Title of the benchmark, in messages.
        folder: The folder of the images.
        first: Captions of each image that are taken; None for all.
        places: See [`find_images`].

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    rows = salesforce_captions(file)
    images = find_images(title, folder, [image for image, _ in rows], places)
    return RetrievalData.from_captions(images, [texts[:first] for _, texts in rows])


def salesforce_captions(file: Path) -> list[tuple[str, list[str]]]:
    """Read the path and the captions of each image.

    Raises:
        BenchmarkError: A row is broken.
    """
    rows = [(row, f"row {number} of {file}") for number, row in enumerate(json_rows(read_json(file), file), 1)]
    return [(text_field(row, "image", place), texts_field(row, "caption", place)) for row, place in rows]
