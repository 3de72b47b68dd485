"""A benchmark of a stranger, as a module of theirs."""

from __future__ import annotations

from pathlib import Path

from tests.builders import tiny

# A stranger's benchmark: eleven images, thirteen captions of which three are equal and one is empty.
STRANGE = """
from llm2clip import Benchmark, BenchmarkImages, RetrievalData

WORDS = "red blue small old dog cat bus tree street park snow".split()


def read(folder):
    images = BenchmarkImages([folder / f"{number}.png" for number in range(11)]).require_files("Strange")
    captions = [[f"a {word} {WORDS[number - 3]}"] for number, word in enumerate(WORDS)]
    captions[4] += ["a red park", ""]
    captions[7] = ["a red park"]
    return RetrievalData.from_captions(images, captions)


BENCHMARKS = [
    Benchmark(
        name="strange", title="Strange", groups=("short",), folder="Strange", needs=("0.png",), files="0 to 10.png",
        counts={"images": 11, "texts": 13}, license="MIT", source="here", read=read, protocol="retrieval",
    )
]
"""


def write_strange(folder: Path) -> None:
    """Write `strange.py` and, in `benchmarks`, the data of its benchmark."""
    (folder / "strange.py").write_text(STRANGE)
    images = folder / "benchmarks/Strange"
    images.mkdir(parents=True)
    for number in range(11):
        tiny.IMAGES[number % 2].rotate(33 * number, expand=True).save(images / f"{number}.png")
