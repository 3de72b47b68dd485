"""Readers of sets of captions in the files in which they were published."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.data import BenchmarkImages, MultilingualData, RetrievalData
from llm2clip.evaluation.reading import first_json_objects, read_json, read_json_lines, read_lines, read_text

# Path and captions of each image, in the order of the file.
Captions = Sequence[tuple[str, Sequence[str]]]
# One blank or tab ends the key; all that follows is the caption.
KEY = re.compile(r"(?P<image>[^#\s]+)#(?P<number>\S+)[ \t](?P<caption>.*)")
# The alphabet for URLs, with which Chinese-CLIP decodes, differs in two characters; both alphabets are read.
STANDARD_ALPHABET = str.maketrans("-_", "+/")
SHAREGPT4V = "share-captioner_coco_lcs_sam_1246k_1107.json"
UNUSABLE, LOW_QUALITY = 2, 1
PARTS = "The following can also be seen in the image:"
# Set of descriptions of IIW and folder of its images, in the order of LoTLIP's reader.
IIW_SETS = {"DOCCI_Test": "docci", "IIW-400": "docci_aar", "DCI_Test": "dci"}
XM3600_LANGUAGES = (
    *("ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr", "he", "hi", "hr", "hu", "id", "it"),
    *("ja", "ko", "mi", "nl", "no", "pl", "pt", "quz", "ro", "ru", "sv", "sw", "te", "th", "tr", "uk", "vi", "zh"),
)
# Where the file of each language of XTD10 is, whose Japanese has the code `jp`.
XTD10_FOLDERS = {"de": "MIC", "fr": "MIC", "jp": "STAIR"} | dict.fromkeys(
    ("en", "es", "it", "ko", "pl", "ru", "tr", "zh"), "XTD10"
)
Row = Mapping[str, Any]


def captioned(folder: Path, captions: Captions, images: Sequence[str] = ("",)) -> RetrievalData:
    """Find the images of captions.

    Args:
        captions: Path or name and captions of each image.
        images: Folders of the images below `folder`; of several, the one that has the file.

    Raises:
        BenchmarkError: There is no caption, or images are missing; the message names them.
    """
    if not captions:
        raise BenchmarkError(f"the file of captions below {folder} is empty.")
    found = find_images(folder, [name for name, _ in captions], images)
    return RetrievalData.from_captions(found, [texts for _, texts in captions])


def find_images(folder: Path, names: Sequence[str], images: Sequence[str] = ("",)) -> BenchmarkImages:
    """Find images by their names below a folder; see [`captioned`]."""
    paths = []
    for name in names:
        places = [folder / part / name for part in images]
        paths.append(next((path for path in places if path.is_file()), places[0]))
    return BenchmarkImages(paths, list(names)).require_files(str(folder))


def read_key_lines(
    folder: Path, file: str, images: Sequence[str], kind: str = "", first: int | None = None
) -> RetrievalData:
    """Read lines `NAME#number<TAB>caption`; names without an ending get `.jpg`.

    Args:
        file, images: The file of captions, and the folders of images, below `folder`.
        kind: How the number has to begin, such as `zhm#`; other lines are left out.
        first: Captions of each image that are taken; None for all.
    """
    captions: dict[str, list[str]] = {}
    for line in filter(str.strip, read_lines(folder / file)):
        if (match := KEY.fullmatch(line)) is None:
            raise BenchmarkError(f"{file} has the line {line[:100]!r}, which is not NAME#number, a tab and a caption.")
        if match["number"].startswith(kind):
            name = match["image"] if "." in match["image"] else f"{match['image']}.jpg"
            captions.setdefault(name, []).append(match["caption"])
    return captioned(folder, [(name, texts[:first]) for name, texts in captions.items()], images)


def read_tab_lines(folder: Path, file: str) -> RetrievalData:
    """Read lines of an image, a tab and its one caption, which may contain tabs."""
    pairs = [line.split("\t", maxsplit=1) for line in read_lines(folder / file)]
    return captioned(folder, [(name, [caption]) for name, caption in pairs])


def read_chinese_clip(folder: Path) -> RetrievalData:
    """Read the two files of Chinese-CLIP: texts in JSON lines with the ids of their images, and images in base64.

    A text may have several images, each of which is right.
    """
    lines = [line.split("\t", maxsplit=1) for line in read_lines(folder / "test_imgs.tsv") if line.strip()]
    images = {
        image: base64.b64decode(encoded.strip().translate(STANDARD_ALPHABET), validate=True)
        for image, encoded in lines
    }
    numbers = {image: number for number, image in enumerate(images)}
    rows = read_json_lines(folder / "test_texts.jsonl")
    named = [[numbers[str(image)] for image in row["image_ids"]] for row in rows]
    pairs = torch.tensor([(text, image) for text, ids in enumerate(named) for image in ids], dtype=torch.int64)
    return RetrievalData(
        BenchmarkImages(list(images.values()), list(images)),
        [row["text"] for row in rows],
        torch.tensor([ids[0] for ids in named], dtype=torch.int64),
        pairs if len(pairs) > len(rows) else None,
    )


def read_sharegpt4v(folder: Path, rows: int) -> RetrievalData:
    """Read the first rows of the whole file, whose order is that of the test set."""
    objects = first_json_objects(folder / SHAREGPT4V, rows)
    return captioned(folder, [(row["image"], [row["conversations"][1]["value"]]) for row in objects])


def read_urban1k(folder: Path) -> RetrievalData:
    """Pair `caption/i.txt` with `image/i.jpg`; a caption is the first line of its file, also if it is empty."""
    captions = {int(path.stem): read_text(path).split("\n")[0] for path in (folder / "caption").glob("[!.]*.txt")}
    return captioned(folder, [(f"image/{number}.jpg", [caption]) for number, caption in sorted(captions.items())])


def read_iiw(folder: Path) -> RetrievalData:
    """Read the three sets that people described, one after another, in the order of their files.

    An image has the name of the field `image` or `image/key`, with or without `.jpg`.
    """
    captions = []
    for name, images in IIW_SETS.items():
        for row in read_json_lines(folder / name / "data.jsonl"):
            image = row["image"] if "image" in row else row["image/key"]
            captions.append((f"{images}/{image.removesuffix('.jpg')}.jpg", [row["IIW"]]))
    return captioned(folder, captions)


def read_dci(folder: Path, caption: Literal["extended", "extra", "short", "complete"]) -> RetrievalData:
    """Read the images of all splits, in the order of `splits.json`.

    Args:
        caption: What the caption of an image is, on which there is no agreement: `short`, the short caption; `extra`,
            the description; `extended`, both, one per line, as in FLAIR, FLAME and LoTLIP, and `get_extended_caption`
            of DCI; `complete`, both and all parts, as in its `get_formatted_complete_description`.
    """
    names = [name for split in read_json(folder / "splits.json").values() for name in split]
    rows = [read_json(folder / "annotations" / name) for name in names]
    return captioned(folder, [(f"photos/{row['image']}", [_dci_caption(row, caption)]) for row in rows])


def _dci_caption(row: Row, form: str) -> str:
    if form in ("short", "extra"):
        return str(row[f"{form}_caption"])
    both = f"{row['short_caption']}\n{row['extra_caption']}"
    if form == "extended":
        return both
    # Of a part of low quality the label alone is taken, of an unusable one nothing.
    lines = [
        mask["label"] if mask["mask_quality"] == LOW_QUALITY else f"{mask['label']}: {mask['caption']}"
        for mask in row["mask_data"].values()
        if mask["mask_quality"] != UNUSABLE
    ]
    return "\n".join([both, *([PARTS, *lines] if lines else [])])


def read_xm3600(folder: Path, first: int | None = None) -> MultilingualData:
    """Read the captions of each language; images without one in a language stay in its gallery.

    Args:
        first: Captions of each image that are taken; None for all.
    """
    rows = read_json_lines(folder / "captions.jsonl")
    captions = {
        language: [row[language]["caption"][:first] if language in row else [] for row in rows]
        for language in XM3600_LANGUAGES
    }
    return _by_language(find_images(folder, [f"images/{row['image/key']}.jpg" for row in rows]), captions)


def read_xtd10(folder: Path, images: Sequence[str]) -> MultilingualData:
    """Read line i of each language's file as the caption of line i of the names, also if it is empty."""
    names = read_lines(folder / "XTD10" / "test_image_names.txt")
    captions = {}
    for language, part in sorted(XTD10_FOLDERS.items()):
        lines = read_lines(folder / part / f"test_1kcaptions_{language}.txt")
        captions[language] = [[line] for _, line in zip(names, lines, strict=True)]
    return _by_language(find_images(folder, names, images), captions)


def _by_language(images: BenchmarkImages, captions: Mapping[str, Iterable[Sequence[str]]]) -> MultilingualData:
    """Make data of the captions of each image, by language; the images are the same ones in all."""
    data = {name: RetrievalData.from_captions(images, list(texts)) for name, texts in captions.items()}
    return MultilingualData({name: part for name, part in data.items() if part.texts})
