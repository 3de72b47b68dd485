"""Flickr30k: the test split of 1,000 images in three files, all 31,783 images, and Chinese captions in three more."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.benchmarks.caption_files import (
    IMAGES,
    TEXTS,
    captions_benchmark,
    comma_lines,
    karpathy,
    key_lines,
    read_chinese_clip,
    salesforce,
)
from llm2clip.evaluation.benchmarks.files import captions_data, first_file
from llm2clip.evaluation.data import RetrievalData

FOLDER = "flickr30k"
# Names of the folder of images: of the official archive, on Kaggle, and of projects.
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images", "Images", "flickr30k_images/flickr30k_images")
LICENSE = "Flickr30k terms: research and education, not commercial; the images belong to their owners on Flickr"
CHINESE_LICENSE = f"not stated (captions); {LICENSE}"
IN_PLACES = "the images in flickr30k-images, images or anywhere below"
CN, CNA = "Flickr30k-CN", "Flickr30k-CNA"
# The first is the release's own path, the last that of FG-CLIP 2.
CNA_FILES = (
    "test/flickr30k_cn_test.txt",
    "flickr30k_cn_test.txt",
    "flickr30k_cna_test.txt",
    "test/flickr30k_cna_test.txt",
    "flickr30k_cna/flickr30k_cna_test.txt",
)
# The images are those of Flickr30k, whose folder may lie beside this one.
CNA_IMAGE_FOLDERS = (*IMAGE_FOLDERS, *(f"../{FOLDER}/{subfolder}" for subfolder in ("", *IMAGE_FOLDERS)))


def read_cn(folder: Path) -> RetrievalData:
    """Read the unpacked archive of Chinese-CLIP."""
    return read_chinese_clip(first_file(folder, (TEXTS, f"{CN}/{TEXTS}")).parent)


def read_cna(folder: Path) -> RetrievalData:
    """Read the test file of Flickr30k-CNA."""
    file = first_file(folder, CNA_FILES)
    home = file.parent.parent if file.parent.name == "test" else file.parent
    return captions_data(CNA, home, key_lines(file), CNA_IMAGE_FOLDERS)


_flickr30k = partial(captions_benchmark, folder=FOLDER, license=LICENSE, folders=IMAGE_FOLDERS)
_SPLIT = {"images": 1000, "texts": 5000}

BENCHMARKS = [
    # The set-up script of LLM2CLIP writes the third, its settings name the last.
    _flickr30k(
        name="flickr30k", title="Flickr30k", groups=("short", "paper"),
        names=("flickr30k_test.json", "annotations/flickr30k_test.json", "./test.json", "./annotations/test.json"),
        read=salesforce, files=f"flickr30k_test.json; {IN_PLACES}", counts=_SPLIT,
        source="flickr30k_test.json of BLIP by Salesforce; the images from the University of Illinois, by a form.",
    ),
    _flickr30k(
        name="flickr30k-karpathy", title="Flickr30k", groups=("short",),
        names=("dataset_flickr30k.json", "annotations/dataset_flickr30k.json"), read=karpathy,
        files=f"dataset_flickr30k.json; {IN_PLACES}", counts=_SPLIT,
        source="dataset_flickr30k.json in caption_datasets.zip by Andrej Karpathy; the images as for flickr30k.",
        note="The images and captions of flickr30k, in another file.",
    ),
    _flickr30k(
        name="flickr30k-clip-benchmark", title="Flickr30k", groups=("short",), names=("flickr30k_test_karpathy.txt",),
        read=comma_lines, files=f"flickr30k_test_karpathy.txt; {IN_PLACES}", counts=_SPLIT,
        source="The release 1.0.0 of retrieval_annotations by mehdidc on GitHub; the images as for flickr30k.",
        note="The images and captions of flickr30k, in another file.",
    ),
    _flickr30k(
        name="flickr30k-whole", title="Flickr30k, all images", groups=("short",), names=("results_20130124.token",),
        read=key_lines, files=f"results_20130124.token; {IN_PLACES}", counts={"images": 31_783, "texts": 158_915},
        source="The University of Illinois, by a form.",
        note="Long-CLIP's own numbers are on these 31,783 images, a gallery 32 times that of the test split.",
    ),
    # The names of Chinese-CLIP are those of any of its archives.
    Benchmark(
        name="flickr30k-cn", title=CN, groups=("languages", "paper"), folder=CN,
        needs=((f"{CN}/{TEXTS}", f"./{TEXTS}"),), files=f"{TEXTS}, {IMAGES}", counts=_SPLIT, license=CHINESE_LICENSE,
        source="Flickr30k-CN.zip, from the readme of Chinese-CLIP.", read=read_cn, protocol="retrieval",
        note="Machine translations of the training captions, human translations of these.",
    ),
    captions_benchmark(
        name="flickr30k-cn-clip-benchmark", title=CN, groups=("languages",), folder=FOLDER,
        names=("flickr30k_test_zh.txt",), read=comma_lines, folders=IMAGE_FOLDERS,
        files=f"flickr30k_test_zh.txt; {IN_PLACES}", counts=_SPLIT, license=CHINESE_LICENSE,
        source="The release 1.0.0 of retrieval_annotations by mehdidc on GitHub; the images as for flickr30k.",
        note="The captions of flickr30k-cn, in another file.",
    ),
    Benchmark(
        name="flickr30k-cna", title=CNA, groups=("languages",), folder=CNA, needs=(CNA_FILES,),
        files=f"test/flickr30k_cn_test.txt; {IN_PLACES}, or beside it in {FOLDER}", counts=_SPLIT,
        license=CHINESE_LICENSE, source="Flickr30k-CNA of 360 AI Research; the images as for flickr30k.",
        read=read_cna, protocol="retrieval",
        note="What FG-CLIP 2 measures: the captions were translated again, other numbers than Flickr30k-CN.",
    ),
]  # fmt: skip
