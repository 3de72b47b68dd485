"""Karpathy's annotation files, `dataset_flickr30k.json` and `dataset_coco.json`, with all splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm2clip.evaluation.benchmarks.base import BenchmarkError
from llm2clip.evaluation.benchmarks.files import json_rows, read_json, text_field


@dataclass(frozen=True)
class KarpathyImage:
    """An image of a split.

    Attributes:
        file: Its path, such as `val2014/COCO_val2014_000000391895.jpg`; the name alone on Flickr30k.
        captions: The raw sentences, not the tokens.
        caption_ids: The id of each; on COCO that of the annotation, by which ECCV Caption and CxC name captions.
        image_id: Its id in COCO, None on Flickr30k.
    """

    file: str
    captions: list[str]
    caption_ids: list[int]
    image_id: int | None


def read_karpathy(file: Path, split: str = "test") -> list[KarpathyImage]:
    """Read the images of a split, in the order of the file.

    Raises:
        BenchmarkError: A row is broken, or the split has no image.
    """
    images = []
    for number, row in enumerate(json_rows(read_json(file).get("images"), f"images of {file}"), 1):
        place = f"image {number} of {file}"
        if text_field(row, "split", place) != split:
            continue
        name = text_field(row, "filename", place)
        path = f"{row['filepath']}/{name}" if row.get("filepath") else name
        captions = [
            text_field(sentence, "raw", place) for sentence in json_rows(row.get("sentences"), f"sentences of {place}")
        ]
        ids = row.get("sentids")
        if not isinstance(ids, list) or len(ids) != len(captions):
            raise BenchmarkError(f"{place} has {len(captions)} sentences, but the sentids {ids!r:.80}.")
        images.append(KarpathyImage(path, captions, ids, row.get("cocoid")))
    if not images:
        raise BenchmarkError(f"{file} has no image of the split {split!r}.")
    return images


def karpathy_captions(file: Path) -> list[tuple[str, list[str]]]:
    """Read the path and the captions of each image of the split `test`."""
    return [(image.file, image.captions) for image in read_karpathy(file)]
