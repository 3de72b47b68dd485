"""The files of Chinese-CLIP: texts in JSON lines with the ids of their images, and images in base64 in a table."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import torch

from llm2clip.evaluation.benchmarks.base import BenchmarkError
from llm2clip.evaluation.benchmarks.data import BenchmarkImages, RetrievalData
from llm2clip.evaluation.benchmarks.files import read_json_lines, read_lines, text_field
from llm2clip.utils.logs import shortened

TEXTS, IMAGES = "test_texts.jsonl", "test_imgs.tsv"
# The alphabet for URLs, with which Chinese-CLIP decodes, differs in two characters; both alphabets are read.
STANDARD_ALPHABET = str.maketrans("-_", "+/")


def read_chinese_clip(title: str, folder: Path) -> RetrievalData:
    """Read `test_imgs.tsv` and `test_texts.jsonl`; a text may have several images, each of which is right.

    Args:
        title: Title of the benchmark, in messages.

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    images = _read_images(folder / IMAGES)
    rows = {image: row for row, image in enumerate(images)}
    texts: list[str] = []
    named: list[list[str]] = []
    for number, row in enumerate(read_json_lines(folder / TEXTS), 1):
        place = f"text {number} of {folder / TEXTS}"
        texts.append(text_field(row, "text", place))
        ids = row.get("image_ids")
        if not isinstance(ids, list) or not ids:
            raise BenchmarkError(f"{place} has no list of image_ids, but {ids!r:.80}.")
        named.append([str(image) for image in ids])
    missing = sorted({image for ids in named for image in ids} - rows.keys())
    if missing:
        raise BenchmarkError(f"{title}: {IMAGES} lacks images that texts name: {shortened(missing)}.")
    owners = torch.tensor([rows[ids[0]] for ids in named], dtype=torch.int64)
    pairs = [(text, rows[image]) for text, ids in enumerate(named) for image in ids]
    matches = torch.tensor(pairs, dtype=torch.int64) if len(pairs) > len(texts) else None
    return RetrievalData(BenchmarkImages(list(images.values()), list(images)), texts, owners, matches)


def _read_images(file: Path) -> dict[str, bytes]:
    """Read the encoded images by their ids."""
    images: dict[str, bytes] = {}
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        image, tab, encoded = line.partition("\t")
        if not tab:
            raise BenchmarkError(f"line {number} of {file} is not id, a tab and base64: {line!r:.80}.")
        if image in images:
            raise BenchmarkError(f"line {number} of {file} has the id {image} of a line before it.")
        try:
            images[image] = base64.b64decode(encoded.strip().translate(STANDARD_ALPHABET), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BenchmarkError(f"line {number} of {file}: image {image} is not base64: {error}.") from error
    return images
