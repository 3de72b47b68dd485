"""COCO captions: the Karpathy test split from two files, with five captions or all, and val2017, another set."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.data import RetrievalData
from llm2clip.evaluation.benchmarks.files import captions_data, first_file, json_rows, read_json, text_field
from llm2clip.evaluation.benchmarks.karpathy import karpathy_captions
from llm2clip.evaluation.benchmarks.salesforce import salesforce_captions
from llm2clip.evaluation.protocols.retrieval import RetrievalProtocol
from llm2clip.utils.logs import shortened

TITLE = "COCO"
FOLDER = "coco"
LICENSE = "CC BY 4.0 (captions), terms of Flickr (images)"
# LLM2CLIP's settings name coco/images, its set-up script coco.
IMAGE_FOLDERS = ("val2014", "images/val2014", "images")
VAL2017_FOLDERS = ("val2017", "images/val2017", "images")
LLM2CLIP_FILES = ("test.json", "annotations/test.json")
SALESFORCE_FILES = ("coco_karpathy_test.json", "annotations/coco_karpathy_test.json")
KARPATHY_FILES = ("dataset_coco.json", "annotations/dataset_coco.json")
VAL2017_FILES = ("annotations/captions_val2017.json", "captions_val2017.json")
# Images with six or seven captions are cut to five, by ECCV Caption, LLM2CLIP and most others.
CAPTIONS = 5


def read_test(first: int | None, folder: Path) -> RetrievalData:
    """Read the annotation file of Salesforce.

    Args:
        first: Captions of each image; None for all.
    """
    captions = salesforce_captions(first_file(folder, (*SALESFORCE_FILES, *LLM2CLIP_FILES)))
    return captions_data(TITLE, folder, captions, IMAGE_FOLDERS, first)


def read_karpathy_test(folder: Path) -> RetrievalData:
    """Read the first five captions of the split `test` of Karpathy's file."""
    captions = karpathy_captions(first_file(folder, KARPATHY_FILES))
    return captions_data(TITLE, folder, captions, IMAGE_FOLDERS, CAPTIONS)


def read_val2017(folder: Path) -> RetrievalData:
    """Read the first five captions of each image of val2017, in the order of the file.

    Raises:
        BenchmarkError: A row is broken, an id is repeated, captions have no image, or image files are missing.
    """
    file = first_file(folder, VAL2017_FILES)
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
    rows = zip(names.values(), captions.values(), strict=True)
    return captions_data("COCO val2017", folder, rows, VAL2017_FOLDERS, CAPTIONS)


_coco = partial(Benchmark, folder=FOLDER, license=LICENSE, protocol=RetrievalProtocol())
_salesforce = partial(
    _coco,
    marker=SALESFORCE_FILES[0],
    other_markers=SALESFORCE_FILES[1:],
    own_markers=LLM2CLIP_FILES,
    files="coco_karpathy_test.json; val2014, or images",
    source="coco_karpathy_test.json of BLIP by Salesforce; val2014.zip from the COCO site.",
)

BENCHMARKS = [
    _salesforce(
        name="coco-salesforce",
        title="COCO",
        groups=("short", "paper"),
        counts={"images": 5000, "texts": 25_000},
        read=partial(read_test, CAPTIONS),
        note="The Karpathy test split, first five captions of each image, as in LLM2CLIP.",
    ),
    _salesforce(
        name="coco-salesforce-all",
        title="COCO, all captions",
        groups=("short",),
        counts={"images": 5000, "texts": 25_010},
        read=partial(read_test, None),
        note="The Karpathy test split, all captions, as in BLIP and CLIP_benchmark.",
    ),
    _coco(
        name="coco-karpathy",
        title="COCO",
        groups=("short",),
        marker=KARPATHY_FILES[0],
        other_markers=KARPATHY_FILES[1:],
        files="dataset_coco.json; val2014, or images",
        counts={"images": 5000, "texts": 25_000},
        source="dataset_coco.json in caption_datasets.zip by Andrej Karpathy; val2014.zip from the COCO site.",
        read=read_karpathy_test,
        note="The images and captions of coco-salesforce, with the ids that ECCV Caption and CxC need.",
    ),
    _coco(
        name="coco-val2017",
        title="COCO val2017",
        groups=("short",),
        marker=VAL2017_FILES[0],
        other_markers=VAL2017_FILES[1:],
        files="annotations/captions_val2017.json; val2017",
        counts={"images": 5000, "texts": 25_000},
        source="annotations_trainval2017.zip and val2017.zip from the COCO site.",
        read=read_val2017,
        note="What Long-CLIP, FG-CLIP and FLAIR call COCO: 593 of its images are in the Karpathy test split.",
    ),
]
