"""Flickr30k: Karpathy's test split of 1,000 images in three files, and all 31,783 images, which Long-CLIP measures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark
from llm2clip.evaluation.benchmarks.caption_lines import read_comma_lines, read_key_lines
from llm2clip.evaluation.benchmarks.data import RetrievalData
from llm2clip.evaluation.benchmarks.files import captions_data, first_file
from llm2clip.evaluation.benchmarks.karpathy import karpathy_captions
from llm2clip.evaluation.benchmarks.salesforce import salesforce_captions
from llm2clip.evaluation.protocols.retrieval import RetrievalProtocol

TITLE = "Flickr30k"
FOLDER = "flickr30k"
# Names of the folder of images: of the official archive, on Kaggle, and of projects.
IMAGE_FOLDERS = ("flickr30k-images", "flickr30k_images", "images", "Images", "flickr30k_images/flickr30k_images")
LICENSE = "Flickr30k terms: research and education, not commercial; the images belong to their owners on Flickr"
IMAGES = "the images in flickr30k-images, images or anywhere below"
# The set-up script of LLM2CLIP writes the first, its settings name the second.
LLM2CLIP_FILES = ("test.json", "annotations/test.json")
SALESFORCE_FILES = ("flickr30k_test.json", "annotations/flickr30k_test.json")
KARPATHY_FILES = ("dataset_flickr30k.json", "annotations/dataset_flickr30k.json")


def read_test(folder: Path) -> RetrievalData:
    """Read the annotation file of Salesforce."""
    captions = salesforce_captions(first_file(folder, (*SALESFORCE_FILES, *LLM2CLIP_FILES)))
    return captions_data(TITLE, folder, captions, IMAGE_FOLDERS)


def read_karpathy_test(folder: Path) -> RetrievalData:
    """Read the split `test` of Karpathy's file."""
    return captions_data(TITLE, folder, karpathy_captions(first_file(folder, KARPATHY_FILES)), IMAGE_FOLDERS)


def read_clip_benchmark_test(folder: Path) -> RetrievalData:
    """Read the test file of CLIP_benchmark."""
    captions = read_comma_lines(folder / "flickr30k_test_karpathy.txt")
    return captions_data(TITLE, folder, captions.items(), IMAGE_FOLDERS)


def read_whole(folder: Path) -> RetrievalData:
    """Read the token file of the whole set."""
    captions = read_key_lines(folder / "results_20130124.token")
    return captions_data(TITLE, folder, captions.items(), IMAGE_FOLDERS)


_flickr30k = partial(Benchmark, folder=FOLDER, license=LICENSE, protocol=RetrievalProtocol())
_SPLIT = {"images": 1000, "texts": 5000}

BENCHMARKS = [
    _flickr30k(
        name="flickr30k",
        title=TITLE,
        groups=("short", "paper"),
        marker=SALESFORCE_FILES[0],
        other_markers=SALESFORCE_FILES[1:],
        own_markers=LLM2CLIP_FILES,
        files=f"flickr30k_test.json; {IMAGES}",
        counts=_SPLIT,
        source="flickr30k_test.json of BLIP by Salesforce; the images from the University of Illinois, by a form.",
        read=read_test,
    ),
    _flickr30k(
        name="flickr30k-karpathy",
        title=TITLE,
        groups=("short",),
        marker=KARPATHY_FILES[0],
        other_markers=KARPATHY_FILES[1:],
        files=f"dataset_flickr30k.json; {IMAGES}",
        counts=_SPLIT,
        source="dataset_flickr30k.json in caption_datasets.zip by Andrej Karpathy; the images as for flickr30k.",
        read=read_karpathy_test,
        note="The images and captions of flickr30k, in another file.",
    ),
    _flickr30k(
        name="flickr30k-clip-benchmark",
        title=TITLE,
        groups=("short",),
        marker="flickr30k_test_karpathy.txt",
        files=f"flickr30k_test_karpathy.txt; {IMAGES}",
        counts=_SPLIT,
        source="The release 1.0.0 of retrieval_annotations by mehdidc on GitHub; the images as for flickr30k.",
        read=read_clip_benchmark_test,
        note="The images and captions of flickr30k, in another file.",
    ),
    _flickr30k(
        name="flickr30k-whole",
        title="Flickr30k, all images",
        groups=("short",),
        marker="results_20130124.token",
        files=f"results_20130124.token; {IMAGES}",
        counts={"images": 31_783, "texts": 158_915},
        source="The University of Illinois, by a form.",
        read=read_whole,
        note="Long-CLIP's own numbers are on these 31,783 images, a gallery 32 times that of the test split.",
    ),
]
