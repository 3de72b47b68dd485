"""Urban1k: 1,000 street scenes with a long caption each, from Long-CLIP."""

from __future__ import annotations

from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.data import BenchmarkImages, RetrievalData
from llm2clip.evaluation.benchmarks.files import read_text
from llm2clip.evaluation.protocols.retrieval import RetrievalProtocol
from llm2clip.utils.logs import shortened

TITLE = "Urban1k"


def read(folder: Path) -> RetrievalData:
    """Pair `caption/i.txt` with `image/i.jpg`; a caption is the first line of its file, also if it is empty.

    Raises:
        BenchmarkError: A caption has no image, an image no caption, or a file has another name.
    """
    captions, pictures = _by_number(folder / "caption", ".txt"), _by_number(folder / "image", ".jpg")
    without = [f"{number}.txt" for number in sorted(pictures.keys() - captions.keys())]
    if without:
        raise BenchmarkError(f"{TITLE} lacks captions of images: {shortened(without)}.")
    numbers = sorted(captions)
    images = BenchmarkImages([folder / "image" / f"{number}.jpg" for number in numbers]).require_files(TITLE)
    return RetrievalData.from_captions(images, [[read_text(captions[number]).split("\n")[0]] for number in numbers])


def _by_number(folder: Path, suffix: str) -> dict[int, Path]:
    files = [path for path in folder.iterdir() if path.suffix == suffix and not path.name.startswith(".")]
    odd = sorted(path.name for path in files if not path.stem.isdecimal())
    if odd:
        raise BenchmarkError(f"the files in {folder} are numbered, but there are {shortened(odd)}.")
    return {int(path.stem): path for path in files}


BENCHMARKS = [
    Benchmark(
        name="urban1k",
        title=TITLE,
        groups=("long", "paper"),
        folder="Urban1k",
        marker="caption/1.txt",
        more_markers=("image",),
        files="image/1.jpg to 1000.jpg, caption/1.txt to 1000.txt",
        counts={"images": 1000, "texts": 1000},
        license="not stated (captions), Visual Genome CC BY 4.0 (images)",
        source="The archive Urban1k.zip of Long-CLIP, in its data set on the Hub.",
        read=read,
        protocol=RetrievalProtocol(),
        note="Caption 592 is empty in one distribution; it stays a query.",
    )
]
