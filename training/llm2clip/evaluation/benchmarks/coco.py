"""Captions of COCO images: the Karpathy test split from two files, five captions or all; val2017; COCO-CN; CRA."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.benchmarks.caption_files import (
    IMAGES,
    TEXTS,
    captions_benchmark,
    coco_annotations,
    karpathy,
    key_lines,
    read_chinese_clip,
    salesforce,
)
from llm2clip.evaluation.benchmarks.files import captions_data, first_file
from llm2clip.evaluation.data import CaptionPairData, RetrievalData
from llm2clip.evaluation.reading import read_lines

FOLDER = "coco"
LICENSE = "CC BY 4.0 (captions), terms of Flickr (images)"
# LLM2CLIP's settings name coco/images, its set-up script coco.
IMAGE_FOLDERS = ("val2014", "images/val2014", "images")
VAL2017_FOLDERS = ("val2017", "images/val2017", "images")
SALESFORCE_FILES = (
    "coco_karpathy_test.json", "annotations/coco_karpathy_test.json", "./test.json", "./annotations/test.json",
)  # fmt: skip
KARPATHY_FILES = ("dataset_coco.json", "annotations/dataset_coco.json")
# Images with six or seven captions are cut to five, by ECCV Caption, LLM2CLIP and most others.
CAPTIONS = 5
CN = "COCO-CN"
# The folder in the archive of its authors.
CN_VERSION = "coco-cn-version1805v1.1"
CN_WRITTEN, CN_TRANSLATED, CN_SPLIT = (
    "imageid.human-written-caption.txt", "imageid.manually-translated-caption.txt", "coco-cn_test.txt",
)  # fmt: skip
# Its images are of both parts of COCO 2014, whose folder may lie beside this one.
COCO_2014_FOLDERS = tuple(
    f"{root}{part}"
    for root in ("", "images/", f"../{FOLDER}/", f"../{FOLDER}/images/")
    for part in ("train2014", "val2014", "")
)
CN_IMAGES = f"train2014 and val2014, here or in {FOLDER}"
CN_LICENSE = f"for research, on request (captions); {LICENSE}"


def read_coco_cn(folder: Path) -> RetrievalData:
    """Read the written captions from the unpacked archive of Chinese-CLIP, or else from that of the authors."""
    file = first_file(folder, (TEXTS, f"{CN}/{TEXTS}", CN_WRITTEN, f"{CN_VERSION}/{CN_WRITTEN}"))
    if file.name == TEXTS:
        return read_chinese_clip(file.parent)
    written = dict(key_lines(file))
    names = [f"{name.strip()}.jpg" for name in read_lines(file.with_name(CN_SPLIT)) if name.strip()]
    return captions_data(CN, folder, [(name, written[name]) for name in names], COCO_2014_FOLDERS)


def read_caption_pairs(folder: Path) -> CaptionPairData:
    """Read two captions of each image from the file of Salesforce, or else of Karpathy; images are not needed."""
    file = first_file(folder, (*SALESFORCE_FILES[:2], *KARPATHY_FILES, *SALESFORCE_FILES[2:]))
    captions = karpathy(file) if file.name == KARPATHY_FILES[0] else salesforce(file)
    return CaptionPairData([texts[0] for _, texts in captions], [texts[1] for _, texts in captions])


_coco = partial(captions_benchmark, folder=FOLDER, license=LICENSE, folders=IMAGE_FOLDERS)
_salesforce = partial(
    _coco,
    names=SALESFORCE_FILES,
    read=salesforce,
    files="coco_karpathy_test.json; val2014, or images",
    source="coco_karpathy_test.json of BLIP by Salesforce; val2014.zip from the COCO site.",
)
_FIVE = {"images": 5000, "texts": 25_000}

BENCHMARKS = [
    _salesforce(
        name="coco-salesforce", title="COCO", groups=("short", "paper"), counts=_FIVE, first=CAPTIONS,
        note="The Karpathy test split, first five captions of each image, as in LLM2CLIP.",
    ),
    _salesforce(
        name="coco-salesforce-all", title="COCO, all captions", groups=("short",),
        counts={"images": 5000, "texts": 25_010},
        note="The Karpathy test split, all captions, as in BLIP and CLIP_benchmark.",
    ),
    _coco(
        name="coco-karpathy", title="COCO", groups=("short",), names=KARPATHY_FILES, read=karpathy, first=CAPTIONS,
        files="dataset_coco.json; val2014, or images", counts=_FIVE,
        source="dataset_coco.json in caption_datasets.zip by Andrej Karpathy; val2014.zip from the COCO site.",
        note="The images and captions of coco-salesforce, with the ids that ECCV Caption and CxC need.",
    ),
    _coco(
        name="coco-val2017", title="COCO val2017", groups=("short",),
        names=("annotations/captions_val2017.json", "captions_val2017.json"), read=coco_annotations,
        folders=VAL2017_FOLDERS, first=CAPTIONS, files="annotations/captions_val2017.json; val2017", counts=_FIVE,
        source="annotations_trainval2017.zip and val2017.zip from the COCO site.",
        note="What Long-CLIP, FG-CLIP and FLAIR call COCO: 593 of its images are in the Karpathy test split.",
    ),
    # The names of Chinese-CLIP are those of any of its archives.
    Benchmark(
        name="coco-cn", title=CN, groups=("languages", "paper"), folder=CN,
        needs=((f"{CN}/{TEXTS}", CN_WRITTEN, f"{CN_VERSION}/{CN_WRITTEN}", f"./{TEXTS}"),),
        files=f"{TEXTS}, {IMAGES}; or {CN_WRITTEN}, {CN_SPLIT}, {CN_IMAGES}", counts={"images": 1000, "texts": 1053},
        license=CN_LICENSE,
        source="COCO-CN.zip, from the readme of Chinese-CLIP; or the authors' archive, on request.", read=read_coco_cn,
        protocol="retrieval", note="Written captions, one or two an image: Wukong, Chinese-CLIP and LLM2CLIP.",
    ),
    captions_benchmark(
        name="coco-cn-translated", title=f"{CN}, translated", groups=("languages",), folder=CN,
        names=(CN_TRANSLATED, f"{CN_VERSION}/{CN_TRANSLATED}"), read=partial(key_lines, kind="zhm#"),
        folders=COCO_2014_FOLDERS, first=CAPTIONS, files=f"{CN_TRANSLATED}; {CN_IMAGES}",
        counts={"images": 1000, "texts": 5000}, license=CN_LICENSE,
        source="The authors' archive, on request; train2014.zip and val2014.zip from the COCO site.",
        note="Manual translations of five English captions each: FG-CLIP 2 reports this set as COCO-CN.",
    ),
    Benchmark(
        name="cra", title="CRA, COCO 5k", groups=("paper",), folder=FOLDER,
        needs=((*SALESFORCE_FILES, *KARPATHY_FILES),), files="coco_karpathy_test.json or dataset_coco.json; no images",
        counts={"pairs": 5000}, license="CC BY 4.0", source="As coco-salesforce or coco-karpathy.",
        read=read_caption_pairs, protocol="caption-retrieval",
        note="Its published numbers changed from 73.0 to 29.5 between versions: compare only what was measured alike.",
    ),
]  # fmt: skip
