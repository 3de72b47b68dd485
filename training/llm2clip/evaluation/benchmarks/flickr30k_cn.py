"""Flickr30k with Chinese captions: Flickr30k-CN in two files, and Flickr30k-CNA, another translation."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmarks import flickr30k
from llm2clip.evaluation.benchmarks.base import Benchmark
from llm2clip.evaluation.benchmarks.caption_lines import read_comma_lines, read_key_lines
from llm2clip.evaluation.benchmarks.chinese_clip import IMAGES, TEXTS, read_chinese_clip
from llm2clip.evaluation.benchmarks.data import RetrievalData
from llm2clip.evaluation.benchmarks.files import captions_data, first_file
from llm2clip.evaluation.protocols.retrieval import RetrievalProtocol

TITLE = "Flickr30k-CN"
COMMA_LINES = "flickr30k_test_zh.txt"
# The first is the release's own path, the last that of FG-CLIP 2.
CNA_FILES = (
    "test/flickr30k_cn_test.txt",
    "flickr30k_cn_test.txt",
    "flickr30k_cna_test.txt",
    "test/flickr30k_cna_test.txt",
    "flickr30k_cna/flickr30k_cna_test.txt",
)
# The images are those of Flickr30k, whose folder may lie beside this one.
CNA_IMAGE_FOLDERS = (
    *flickr30k.IMAGE_FOLDERS,
    *(f"../{flickr30k.FOLDER}/{place}" for place in ("", *flickr30k.IMAGE_FOLDERS)),
)


def read_zip(folder: Path) -> RetrievalData:
    """Read the unpacked archive of Chinese-CLIP."""
    return read_chinese_clip(TITLE, first_file(folder, (TEXTS, f"{TITLE}/{TEXTS}")).parent)


def read_clip_benchmark_test(folder: Path) -> RetrievalData:
    """Read the Chinese test file of CLIP_benchmark."""
    return captions_data(TITLE, folder, read_comma_lines(folder / COMMA_LINES).items(), flickr30k.IMAGE_FOLDERS)


def read_cna(folder: Path) -> RetrievalData:
    """Read the test file of Flickr30k-CNA."""
    file = first_file(folder, CNA_FILES)
    home = file.parent.parent if file.parent.name == "test" else file.parent
    return captions_data("Flickr30k-CNA", home, read_key_lines(file).items(), CNA_IMAGE_FOLDERS)


_flickr30k_cn = partial(
    Benchmark,
    counts={"images": 1000, "texts": 5000},
    license=f"not stated (captions); {flickr30k.LICENSE}",
    protocol=RetrievalProtocol(),
)

BENCHMARKS = [
    _flickr30k_cn(
        name="flickr30k-cn",
        title=TITLE,
        groups=("languages", "paper"),
        folder=TITLE,
        # Below its own folder the names are those of any archive of Chinese-CLIP.
        marker=f"{TITLE}/{TEXTS}",
        own_markers=(TEXTS,),
        files=f"{TEXTS}, {IMAGES}",
        source="Flickr30k-CN.zip, from the readme of Chinese-CLIP.",
        read=read_zip,
        note="Machine translations of the training captions, human translations of these.",
    ),
    _flickr30k_cn(
        name="flickr30k-cn-clip-benchmark",
        title=TITLE,
        groups=("languages",),
        folder=flickr30k.FOLDER,
        marker=COMMA_LINES,
        files=f"{COMMA_LINES}; {flickr30k.IMAGES}",
        source="The release 1.0.0 of retrieval_annotations by mehdidc on GitHub; the images as for flickr30k.",
        read=read_clip_benchmark_test,
        note="The captions of flickr30k-cn, in another file.",
    ),
    _flickr30k_cn(
        name="flickr30k-cna",
        title="Flickr30k-CNA",
        groups=("languages",),
        folder="Flickr30k-CNA",
        marker=CNA_FILES[0],
        other_markers=CNA_FILES[1:],
        files=f"test/flickr30k_cn_test.txt; {flickr30k.IMAGES}, or beside it in {flickr30k.FOLDER}",
        source="Flickr30k-CNA of 360 AI Research; the images as for flickr30k.",
        read=read_cna,
        note="What FG-CLIP 2 measures: the captions were translated again, other numbers than Flickr30k-CN.",
    ),
]
