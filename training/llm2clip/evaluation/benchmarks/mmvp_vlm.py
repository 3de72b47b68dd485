"""MMVP-VLM: pairs of images that CLIP finds alike, with a statement each, in nine visual patterns."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.data import BenchmarkImages, PairData
from llm2clip.evaluation.reading import read_text

TITLE = "MMVP-VLM"
FILE = "Questions.csv"
IMAGES = "MLLM_VLM Images"


def read(folder: Path) -> PairData:
    """Read the pairs: rows of number, pattern and statement, two by two; the odd number is that of the first image.

    Raises:
        BenchmarkError: A row is broken, has no partner, or images are missing.
    """
    rows = [row for row in csv.reader(io.StringIO(read_text(folder / FILE), newline="")) if row][1:]
    broken = [str(row) for row in rows if len(row) != 3 or not row[0].strip().isdecimal()]
    if broken:
        raise BenchmarkError(f"{FILE} of {TITLE} has rows that are not number, pattern, statement: {broken[0]:.200}.")
    if len(rows) % 2:
        raise BenchmarkError(f"{FILE} of {TITLE} has {len(rows)} rows, so that row {rows[-1][0]} has no partner.")
    images, texts, kinds = [], [], []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        pair = sorted((first, second), key=lambda row: int(row[0]))
        odd, even = (int(row[0]) for row in pair)
        if odd % 2 == 0 or even != odd + 1 or pair[0][1] != pair[1][1]:
            raise BenchmarkError(f"rows {first[0]} and {second[0]} of {FILE} of {TITLE} are no pair.")
        images += [folder / IMAGES / row[1].strip() / f"{int(row[0])}.jpg" for row in pair]
        texts += [row[2] for row in pair]
        kinds.append(pair[0][1].strip())
    return PairData(BenchmarkImages(images).require_files(TITLE), texts, kinds)


BENCHMARKS = [
    Benchmark(
        name="mmvp-vlm",
        title=TITLE,
        groups=("composition",),
        folder="mmvp_vlm",
        needs=(FILE, IMAGES),
        files=f"{FILE}; {IMAGES}/PATTERN/1.jpg to 270.jpg",
        counts={"pairs": 135, "kinds": 9},
        license="MIT",
        source="The data set MMVP_VLM on the Hub.",
        read=read,
        protocol="image-choice",
        note="Nine patterns of 15 pairs: one pair is 0.7 points.",
    )
]
