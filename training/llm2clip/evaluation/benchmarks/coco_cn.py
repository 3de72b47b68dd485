"""COCO-CN: 1,000 COCO images with captions written in Chinese, or with five captions translated by people."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmarks import coco
from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.caption_lines import read_key_lines
from llm2clip.evaluation.benchmarks.chinese_clip import IMAGES, TEXTS, read_chinese_clip
from llm2clip.evaluation.benchmarks.data import RetrievalData
from llm2clip.evaluation.benchmarks.files import captions_data, first_file, read_lines
from llm2clip.evaluation.protocols.retrieval import RetrievalProtocol
from llm2clip.utils.logs import shortened

TITLE = "COCO-CN"
# The folder in the archive of its authors.
VERSION = "coco-cn-version1805v1.1"
WRITTEN, TRANSLATED = "imageid.human-written-caption.txt", "imageid.manually-translated-caption.txt"
SPLIT = "coco-cn_test.txt"
CAPTIONS = 5
# Its images are of both parts of COCO 2014, whose folder may lie beside this one.
COCO_2014_FOLDERS = tuple(
    f"{root}{part}"
    for root in ("", "images/", f"../{coco.FOLDER}/", f"../{coco.FOLDER}/images/")
    for part in ("train2014", "val2014", "")
)


def read_zip(folder: Path) -> RetrievalData:
    """Read the written captions from the unpacked archive of Chinese-CLIP, or else from that of the authors.

    Raises:
        BenchmarkError: A row is broken, or captions or images are missing.
    """
    file = first_file(folder, (TEXTS, f"{TITLE}/{TEXTS}", WRITTEN, f"{VERSION}/{WRITTEN}"))
    if file.name == TEXTS:
        return read_chinese_clip(TITLE, file.parent)
    written = read_key_lines(file)
    names = [f"{name.strip()}.jpg" for name in read_lines(file.with_name(SPLIT)) if name.strip()]
    without = [name for name in names if name not in written]
    if without:
        raise BenchmarkError(f"{file} has no caption of images of {SPLIT}: {shortened(without)}.")
    return captions_data(TITLE, folder, [(name, written[name]) for name in names], COCO_2014_FOLDERS)


def read_translated(folder: Path) -> RetrievalData:
    """Read the first five manual translations (`zhm`) of each image."""
    captions = read_key_lines(first_file(folder, (TRANSLATED, f"{VERSION}/{TRANSLATED}")), kind="zhm#")
    return captions_data(f"{TITLE} translated", folder, captions.items(), COCO_2014_FOLDERS, CAPTIONS)


_coco_cn = partial(
    Benchmark,
    folder=TITLE,
    license=f"for research, on request (captions); {coco.LICENSE}",
    protocol=RetrievalProtocol(),
)
_IMAGES = f"train2014 and val2014, here or in {coco.FOLDER}"

BENCHMARKS = [
    _coco_cn(
        name="coco-cn",
        title=TITLE,
        groups=("languages", "paper"),
        # Below its own folder the names are those of any archive of Chinese-CLIP.
        marker=f"{TITLE}/{TEXTS}",
        own_markers=(TEXTS,),
        other_markers=(WRITTEN, f"{VERSION}/{WRITTEN}"),
        files=f"{TEXTS}, {IMAGES}; or {WRITTEN}, {SPLIT}, {_IMAGES}",
        counts={"images": 1000, "texts": 1053},
        source="COCO-CN.zip, from the readme of Chinese-CLIP; or the authors' archive, on request.",
        read=read_zip,
        note="Written captions, one or two an image: Wukong, Chinese-CLIP and LLM2CLIP.",
    ),
    _coco_cn(
        name="coco-cn-translated",
        title=f"{TITLE}, translated",
        groups=("languages",),
        marker=TRANSLATED,
        other_markers=(f"{VERSION}/{TRANSLATED}",),
        files=f"{TRANSLATED}; {_IMAGES}",
        counts={"images": 1000, "texts": 5000},
        source="The authors' archive, on request; train2014.zip and val2014.zip from the COCO site.",
        read=read_translated,
        note="Manual translations of five English captions each: FG-CLIP 2 reports this set as COCO-CN.",
    ),
]
