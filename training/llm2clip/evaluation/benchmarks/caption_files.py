"""Files of captions in the formats that several sets share: each function returns the captions of each image."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.files import captions_data, first_file
from llm2clip.evaluation.data import BenchmarkImages, RetrievalData
from llm2clip.evaluation.reading import read_json, read_json_lines, read_lines

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
    folders: Sequence[str],
    first: int | None = None,
    **fields: Any,
) -> Benchmark:
    """Make the benchmark of a file of captions.

    Args:
        title: The set, also in messages.
        names: Names of the file, of which the first that is there is read.
        read: Reads the format of the file.
        folders, first: See [`captions_data`].
        fields: The other fields of [`Benchmark`].
    """

    def read_set(folder: Path) -> RetrievalData:
        return captions_data(title, folder, read(first_file(folder, names)), folders, first)

    return Benchmark(title=title, needs=(names,), read=read_set, protocol="retrieval", **fields)


def salesforce(file: Path) -> Captions:
    """Read a file of Salesforce (ALBEF, BLIP), as LLM2CLIP does: `[{"image": path, "caption": [texts]}]`."""
    rows = read_json(file)
    for row in rows:
        if not isinstance(row["caption"], list):
            raise BenchmarkError(
                f"{file}: the caption of {row['image']} is {row['caption']!r:.80}, and no list of texts."
            )
    return [(row["image"], row["caption"]) for row in rows]


@dataclass(frozen=True)
class KarpathyImage:
    """An image of a split.

    Attributes:
        file: Its path, such as `val2014/COCO_val2014_000000391895.jpg`; the name alone on Flickr30k.
        captions: The raw sentences, not the tokens.
        caption_ids: The id of each; on COCO that of the annotation, by which ECCV Caption and CxC name captions.
        image_id: Its id in COCO, 0 on Flickr30k.
    """

    file: str
    captions: list[str]
    caption_ids: list[int]
    image_id: int


def read_karpathy(file: Path) -> list[KarpathyImage]:
    """Read the images of the split `test` of Karpathy's `dataset_flickr30k.json` or `dataset_coco.json`, in order."""
    return [
        KarpathyImage(
            "/".join(filter(None, [row.get("filepath"), row["filename"]])),
            [sentence["raw"] for sentence in row["sentences"]],
            row["sentids"],
            row.get("cocoid", 0),
        )
        for row in read_json(file)["images"]
        if row["split"] == "test"
    ]


def karpathy(file: Path) -> Captions:
    """Read the split `test` of Karpathy's file; see [`read_karpathy`]."""
    return [(image.file, image.captions) for image in read_karpathy(file)]


def coco_annotations(file: Path) -> Captions:
    """Read the annotations of COCO, `captions_val2017.json`."""
    content = read_json(file)
    captions: dict[int, tuple[str, list[str]]] = {row["id"]: (row["file_name"], []) for row in content["images"]}
    if len(captions) < len(content["images"]):
        raise BenchmarkError(f"{file} has images with the same id.")
    for row in content["annotations"]:
        captions[row["image_id"]][1].append(row["caption"])
    return list(captions.values())


def comma_lines(file: Path) -> Captions:
    """Read a header and lines `NAME.jpg,caption`, as CLIP_benchmark has them; blank lines are left out.

    A line ends its name at the first `.jpg,`, because captions contain commas.
    """
    rows = [line.split(".jpg,", maxsplit=1) for line in read_lines(file)[1:] if line.strip()]
    return _by_image((f"{name}.jpg", caption) for name, caption in rows)


def key_lines(file: Path, kind: str = "") -> Captions:
    """Read lines `NAME#number<TAB>caption`; names without an ending get `.jpg`.

    Args:
        kind: How the number has to begin, such as `zhm#`; other lines are left out.
    """
    rows = []
    for line in filter(str.strip, read_lines(file)):
        if (match := KEY.fullmatch(line)) is None:
            raise BenchmarkError(f"{file} has the line {line[:100]!r}, which is not NAME#number, a tab and a caption.")
        if match["number"].startswith(kind):
            rows.append((match["image"] if "." in match["image"] else f"{match['image']}.jpg", match["caption"]))
    return _by_image(rows)


def tab_lines(file: Path) -> Captions:
    """Read lines of an image, a tab and its one caption, which may contain tabs."""
    pairs = [line.split("\t", maxsplit=1) for line in read_lines(file)]
    return [(name, [caption]) for name, caption in pairs]


def _by_image(rows: Iterable[tuple[str, str]]) -> Captions:
    """Collect the captions of each image, in order of first appearance."""
    captions: dict[str, list[str]] = {}
    for image, caption in rows:
        captions.setdefault(image, []).append(caption)
    return list(captions.items())


def read_chinese_clip(folder: Path) -> RetrievalData:
    """Read the two files of Chinese-CLIP: texts in JSON lines with the ids of their images, and images in base64.

    A text may have several images, each of which is right.
    """
    lines = [line.split("\t", maxsplit=1) for line in read_lines(folder / IMAGES) if line.strip()]
    images = {
        image: base64.b64decode(encoded.strip().translate(STANDARD_ALPHABET), validate=True)
        for image, encoded in lines
    }
    numbers = {image: number for number, image in enumerate(images)}
    rows = read_json_lines(folder / TEXTS)
    named = [[numbers[str(image)] for image in row["image_ids"]] for row in rows]
    pairs = torch.tensor([(text, image) for text, ids in enumerate(named) for image in ids], dtype=torch.int64)
    return RetrievalData(
        BenchmarkImages(list(images.values()), list(images)),
        [row["text"] for row in rows],
        torch.tensor([ids[0] for ids in named], dtype=torch.int64),
        pairs if len(pairs) > len(rows) else None,
    )
