"""Files of captions in the formats that several sets share: each function returns the captions of each image."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.files import captions_data, first_file
from llm2clip.evaluation.data import BenchmarkImages, RetrievalData
from llm2clip.evaluation.reading import (
    json_rows,
    read_json,
    read_json_lines,
    read_json_rows,
    read_lines,
    text_field,
    texts_field,
)
from llm2clip.utils.logs import shortened

# Path and captions of each image, in the order of the file.
Captions = list[tuple[str, list[str]]]
# The files of Chinese-CLIP.
TEXTS, IMAGES = "test_texts.jsonl", "test_imgs.tsv"
# One blank or tab ends the key; all that follows is the caption.
KEY = re.compile(r"(?P<image>[^#\s]+)#(?P<number>\S+)[ \t](?P<caption>.*)")
# The alphabet for URLs, with which Chinese-CLIP decodes, differs in two characters; both alphabets are read.
STANDARD_ALPHABET = str.maketrans("-_", "+/")


def captions_benchmark(
    title: str,
    names: tuple[str, ...],
    read: Callable[[Path], Captions],
    places: Sequence[str],
    first: int | None = None,
    **fields: Any,
) -> Benchmark:
    """Make the benchmark of a file of captions.

    Args:
        title: The set, also in messages.
        names: Names of the file, of which the first that is there is read.
        read: Reads the format of the file.
        places, first: See [`captions_data`].
        fields: The other fields of [`Benchmark`].
    """

    def read_set(folder: Path) -> RetrievalData:
        return captions_data(title, folder, read(first_file(folder, names)), places, first)

    return Benchmark(title=title, needs=(names,), read=read_set, protocol="retrieval", **fields)


def salesforce(file: Path) -> Captions:
    """Read a file of Salesforce (ALBEF, BLIP), as LLM2CLIP does: `[{"image": path, "caption": [texts]}]`.

    Raises:
        BenchmarkError: A row is broken.
    """
    rows = [(row, f"row {number} of {file}") for number, row in enumerate(read_json_rows(file), 1)]
    return [(text_field(row, "image", place), texts_field(row, "caption", place)) for row, place in rows]


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


def read_karpathy(file: Path) -> list[KarpathyImage]:
    """Read the images of the split `test` of Karpathy's `dataset_flickr30k.json` or `dataset_coco.json`, in order.

    Raises:
        BenchmarkError: A row is broken, or the split has no image.
    """
    images = []
    for number, row in enumerate(json_rows(read_json(file).get("images"), f"images of {file}"), 1):
        place = f"image {number} of {file}"
        if text_field(row, "split", place) != "test":
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
        raise BenchmarkError(f"{file} has no image of the split 'test'.")
    return images


def karpathy(file: Path) -> Captions:
    """Read the split `test` of Karpathy's file; see [`read_karpathy`]."""
    return [(image.file, image.captions) for image in read_karpathy(file)]


def coco_annotations(file: Path) -> Captions:
    """Read the annotations of COCO, `captions_val2017.json`.

    Raises:
        BenchmarkError: A row is broken, an id is repeated, or captions have no image.
    """
    content = read_json(file)
    names: dict[object, str] = {}
    for number, row in enumerate(json_rows(content.get("images"), f"images of {file}"), 1):
        if row.get("id") in names:
            raise BenchmarkError(f"image {number} of {file} has the id {row.get('id')!r} of an image before it.")
        names[row.get("id")] = text_field(row, "file_name", f"image {number} of {file}")
    captions: dict[object, list[str]] = {image: [] for image in names}
    annotations = json_rows(content.get("annotations"), f"annotations of {file}")
    lost = [
        f"{number} ({row.get('image_id')!r})"
        for number, row in enumerate(annotations, 1)
        if row.get("image_id") not in names
    ]
    if lost:
        raise BenchmarkError(
            f"{len(lost):,} annotations of {file} have an image_id that no image has: {shortened(lost)}."
        )
    for number, row in enumerate(annotations, 1):
        captions[row["image_id"]].append(text_field(row, "caption", f"annotation {number} of {file}"))
    return list(zip(names.values(), captions.values(), strict=True))


def comma_lines(file: Path) -> Captions:
    """Read a header and lines `NAME.jpg,caption`, as CLIP_benchmark has them; blank lines are left out.

    A line ends its name at the first `.jpg,`, because captions contain commas.

    Raises:
        BenchmarkError: A line has no `.jpg,`.
    """
    rows = []
    for number, line in enumerate(read_lines(file)[1:], 2):
        stem, comma, caption = line.partition(".jpg,")
        if comma:
            rows.append((f"{stem}.jpg", caption))
        elif line.strip():
            raise BenchmarkError(f"line {number} of {file} is not NAME.jpg,caption: {line!r:.80}.")
    return _by_image(rows)


def key_lines(file: Path, kind: str = "") -> Captions:
    """Read lines `NAME#number<TAB>caption`; blank lines are left out, and names without an ending get `.jpg`.

    Args:
        kind: How the number has to begin, such as `zhm#`; other lines are left out.

    Raises:
        BenchmarkError: A line is something else.
    """
    rows = []
    for number, line in enumerate(read_lines(file), 1):
        match = KEY.fullmatch(line)
        if match is None and line.strip():
            raise BenchmarkError(f"line {number} of {file} is not NAME#number, a tab and a caption: {line!r:.80}.")
        if match is not None and match["number"].startswith(kind):
            rows.append((match["image"] if "." in match["image"] else f"{match['image']}.jpg", match["caption"]))
    return _by_image(rows)


def tab_lines(file: Path) -> Captions:
    """Read lines of an image, a tab and its one caption, which may contain tabs.

    Raises:
        BenchmarkError: A line has no tab.
    """
    pairs = [line.split("\t", maxsplit=1) for line in read_lines(file)]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) < 2:
            raise BenchmarkError(f"line {number} of {file} has no tab between image and caption.")
    return [(name, [caption]) for name, caption in pairs]


def _by_image(rows: Iterable[tuple[str, str]]) -> Captions:
    """Collect the captions of each image, in order of first appearance."""
    captions: dict[str, list[str]] = {}
    for image, caption in rows:
        captions.setdefault(image, []).append(caption)
    return list(captions.items())


def read_chinese_clip(title: str, folder: Path) -> RetrievalData:
    """Read the two files of Chinese-CLIP: texts in JSON lines with the ids of their images, and images in base64.

    A text may have several images, each of which is right.

    Args:
        title: Title of the benchmark, in messages.

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    images = _encoded_images(folder / IMAGES)
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


def _encoded_images(file: Path) -> dict[str, bytes]:
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
