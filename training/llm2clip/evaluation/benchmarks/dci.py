"""Densely Captioned Images (DCI): SA-1B images with a short caption, a long one, and captions of their parts.

There is no agreement on what the caption of an image is, so each form has a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.data import BenchmarkImages, RetrievalData
from llm2clip.evaluation.reading import read_json, text_field

TITLE = "DCI"
UNUSABLE, LOW_QUALITY = 2, 1
PARTS = "The following can also be seen in the image:"

Row = Mapping[str, Any]


def short(row: Row, place: str) -> str:
    """The short caption."""
    return text_field(row, "short_caption", place)


def extra(row: Row, place: str) -> str:
    """The description alone, as in FG-CLIP 2."""
    return text_field(row, "extra_caption", place)


def extended(row: Row, place: str) -> str:
    """Both, one per line, as in FLAIR, FLAME and LoTLIP, and `get_extended_caption` of DCI."""
    return f"{short(row, place)}\n{extra(row, place)}"


def complete(row: Row, place: str) -> str:
    """Both and all parts, one per line, as in `get_formatted_complete_description` of DCI.

    Of a part of low quality the label alone is taken, of an unusable one nothing.
    """
    masks = row.get("mask_data")
    if not isinstance(masks, dict):
        raise BenchmarkError(f"{place} has no 'mask_data'.")
    lines = []
    for key, mask in masks.items():
        if mask.get("mask_quality") == UNUSABLE:
            continue
        label = text_field(mask, "label", f"mask {key} of {place}")
        if mask.get("mask_quality") == LOW_QUALITY:
            lines.append(label)
        else:
            lines.append(f"{label}: {text_field(mask, 'caption', f'mask {key} of {place}')}")
    return "\n".join([extended(row, place), *([PARTS, *lines] if lines else [])])


def read(caption: Callable[[Row, str], str], folder: Path) -> RetrievalData:
    """Read the images of all splits, in the order of `splits.json`.

    Args:
        caption: Makes the caption of a row; the second argument is its name in messages.

    Raises:
        BenchmarkError: An annotation or an image is missing, or a row is broken.
    """
    names = [name for split in read_json(folder / "splits.json").values() for name in split]
    BenchmarkImages([folder / "annotations" / name for name in names]).require_files(f"{TITLE} (annotations)")
    images, captions = [], []
    for name in names:
        row = read_json(folder / "annotations" / name)
        images.append(folder / "photos" / text_field(row, "image", name))
        captions.append([caption(row, name)])
    return RetrievalData.from_captions(BenchmarkImages(images).require_files(TITLE), captions)


def _benchmark(name: str, title: str, caption: Callable[[Row, str], str], note: str) -> Benchmark:
    return Benchmark(
        name=name, title=title, groups=("long",), folder="densely_captioned_images",
        needs=("splits.json", "annotations"), files="splits.json, annotations/NAME.json, photos/sa_N.jpg",
        counts={"images": 7805, "texts": 7805}, license="CC BY-NC 4.0 (captions), SA-1B research license (images)",
        source="The archive dci.tar.gz of DCI; the images are in sa_000138.tar of SA-1B.", read=partial(read, caption),
        protocol="retrieval", note=note,
    )  # fmt: skip


BENCHMARKS = [
    _benchmark("dci", TITLE, extended, "Short caption, newline, description: the form of FLAIR, FLAME and LoTLIP."),
    _benchmark("dci-extra", "DCI (description)", extra, "The description alone: the form of FG-CLIP 2."),
    _benchmark("dci-short", "DCI (short)", short, "The short caption alone."),
    _benchmark("dci-complete", "DCI (all parts)", complete, "Both captions and those of all parts of the image."),
]
