"""DOCCI: photographs by one person, each with a long description by an annotator."""

from __future__ import annotations

from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark
from llm2clip.evaluation.benchmarks.data import BenchmarkImages, RetrievalData
from llm2clip.evaluation.benchmarks.files import read_json_lines, text_field
from llm2clip.evaluation.protocols.retrieval import RetrievalProtocol

TITLE = "DOCCI"
FILE = "docci_descriptions.jsonlines"


def read(folder: Path) -> RetrievalData:
    """Read the rows of the split `test`, in the order of the file.

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    rows = [(f"row {number} of {FILE}", row) for number, row in enumerate(read_json_lines(folder / FILE), 1)]
    test = [(place, row) for place, row in rows if text_field(row, "split", place) == "test"]
    images = BenchmarkImages([folder / "images" / text_field(row, "image_file", place) for place, row in test])
    captions = [[text_field(row, "description", place)] for place, row in test]
    return RetrievalData.from_captions(images.require_files(TITLE), captions)


BENCHMARKS = [
    Benchmark(
        name="docci",
        title=TITLE,
        groups=("long", "paper"),
        folder="docci",
        marker=FILE,
        files=f"{FILE}; images/test_00000.jpg and so on",
        counts={"images": 5000, "texts": 5000},
        license="CC BY 4.0",
        source="The descriptions and docci_images.tar.gz from the DOCCI page of Google.",
        read=read,
        protocol=RetrievalProtocol(),
        note="The test split has 5,000 images; the text of LLM2CLIP says 1.5K.",
    )
]
