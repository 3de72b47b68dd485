"""LIT-CN, DCI-CN and DOCCI-CN: long Chinese captions, from FG-CLIP 2."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.data import RetrievalData
from llm2clip.evaluation.benchmarks.files import captions_data, read_lines
from llm2clip.evaluation.protocols.retrieval import RetrievalProtocol


def read(title: str, file: str, folder: Path) -> RetrievalData:
    """Read lines of an image, a tab and its caption, which may contain tabs.

    Images lie at their paths, or anywhere below the folder by their file names.

    Raises:
        BenchmarkError: A line has no tab, or images are missing.
    """
    lines = read_lines(folder / file)
    pairs = [line.split("\t", maxsplit=1) for line in lines]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) < 2:
            raise BenchmarkError(f"line {number} of {file} of {title} has no tab between image and caption.")
    return captions_data(title, folder, [(name, [caption]) for name, caption in pairs], ("images",))


def _benchmark(title: str, file: str, images: str) -> Benchmark:
    return Benchmark(
        name=title.lower(),
        title=title,
        groups=("long", "languages"),
        folder=title,
        marker=file,
        files=f"{file}; {images}",
        counts={},
        license="Apache 2.0 as stated by FG-CLIP 2 (captions); of the images see their source",
        source=f"The data set {title} of FG-CLIP 2 on the Hub.",
        read=partial(read, title, file),
        protocol=RetrievalProtocol(),
        note="No published counts are checked: its paper gives none for the files.",
    )


BENCHMARKS = [
    _benchmark("LIT-CN", "image_caption_long_cn.txt", "its images, at the paths in the file"),
    _benchmark("DCI-CN", "image_caption_trans.txt", "the images of DCI, in images or at the paths in the file"),
    _benchmark("DOCCI-CN", "image_caption_trans.txt", "the images of DOCCI, in images or at the paths in the file"),
]
