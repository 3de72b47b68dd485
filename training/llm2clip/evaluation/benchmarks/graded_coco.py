"""Readers of ECCV Caption and CxC: the COCO test images with all captions that people found right for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llm2clip.command_line.logs import shortened
from llm2clip.encoders.images import ImageSet
from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks.parquet import Parquet
from llm2clip.evaluation.data import GradedData, RetrievalData
from llm2clip.evaluation.reading import read_json

PACKAGE = "eccv_caption"

Pairs = Iterable[tuple[int, int]]
# Captions of each image by its id: their ids and texts.
Gallery = Mapping[int, Sequence[tuple[int, str]]]


def read_eccv(folder: Path, judgements: Literal["eccv", "cxc"], captions: Parquet) -> GradedData:
    """Read the images and captions, and the judgements in the installed package `eccv_caption`.

    The gallery is that of its `original_image_to_caption.json`: five captions of each image.
    """
    data = _package_data()
    five = _judgements(data / "original_image_to_caption.json")
    images, gallery = _gallery(folder, captions)
    kept = {
        image: [(number, text) for number, text in texts if number in five.get(image, [])]
        for image, texts in gallery.items()
    }
    there = {number for texts in kept.values() for number, _ in texts}
    missing = [str(number) for numbers in five.values() for number in numbers if number not in there]
    if missing:
        raise BenchmarkError(f"the captions in {folder} lack those of the ids {shortened(missing)}.")
    texts, of_images = (
        _judgements(data / f"{judgements}_{direction}.json") for direction in ("caption_to_image", "image_to_caption")
    )
    return _graded(images, kept, _pairs(texts), _pairs(of_images))


def _package_data() -> Path:
    """Return the folder of the judgements, without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BenchmarkError(f"the judgements are those of the package {PACKAGE}: pip install {PACKAGE}.")
    return Path(spec.submodule_search_locations[0]) / "data"


def _gallery(folder: Path, captions: Parquet) -> tuple[ImageSet, Gallery]:
    """Read the images, in the order of their ids in the gallery, and their captions with ids."""
    table = captions.table(folder)
    assert isinstance(captions.image, str)
    assert captions.image_id is not None
    assert captions.text_ids is not None
    numbers = [list(ids) for ids in table[captions.text_ids]]
    rows = zip(table[captions.image_id], numbers, captions.captions(table), strict=True)
    return captions.images(table, captions.image), {
        int(image): list(zip(map(int, ids), texts, strict=True)) for image, ids, texts in rows
    }


def _graded(images: ImageSet, gallery: Gallery, texts: Pairs, of_images: Pairs) -> GradedData:
    """Replace ids by positions; `texts` are pairs of caption and image, `of_images` of image and caption."""
    data = RetrievalData.from_captions(images, [[text for _, text in some] for some in gallery.values()])
    image_rows = {image: row for row, image in enumerate(gallery)}
    text_rows = {number: row for row, (number, _) in enumerate(pair for some in gallery.values() for pair in some)}
    matches, outside = _positions(texts, text_rows, image_rows)
    image_matches, more = _positions(of_images, image_rows, text_rows)
    words = [f"caption {query}, image {candidate}" for query, candidate in outside]
    words += [f"image {query}, caption {candidate}" for query, candidate in more]
    return GradedData(data.images, data.texts, data.owners, matches, image_matches, words)


def _positions(pairs: Pairs, first: dict[int, int], second: dict[int, int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the positions of the pairs of ids, `(pairs, 2)` sorted, and the pairs with an unknown id, sorted."""
    distinct = set(pairs)
    known = sorted(
        (first[query], second[candidate]) for query, candidate in distinct if query in first and candidate in second
    )
    unknown = sorted(
        (query, candidate) for query, candidate in distinct if query not in first or candidate not in second
    )
    return torch.tensor(known, dtype=torch.int64).reshape(-1, 2), unknown


def _judgements(path: Path) -> dict[int, list[int]]:
    return {int(query): [int(candidate) for candidate in candidates] for query, candidates in read_json(path).items()}


def _pairs(judgements: dict[int, list[int]]) -> Pairs:
    return ((query, candidate) for query, candidates in judgements.items() for candidate in candidates)
