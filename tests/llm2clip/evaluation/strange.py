"""A benchmark of a stranger, as a module of theirs."""

from __future__ import annotations

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
