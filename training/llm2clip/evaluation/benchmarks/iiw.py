"""ImageInWords (IIW): hyper-detailed descriptions of 612 images of DOCCI and DCI."""

from __future__ import annotations

from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark
from llm2clip.evaluation.benchmarks.data import BenchmarkImages, RetrievalData
from llm2clip.evaluation.benchmarks.files import read_json_lines, text_field
from llm2clip.evaluation.protocols.retrieval import RetrievalProtocol

TITLE = "IIW"
# Set of descriptions and folder of its images, in the order of LoTLIP's reader.
SETS = {"DOCCI_Test": "docci", "IIW-400": "docci_aar", "DCI_Test": "dci"}


def read(folder: Path) -> RetrievalData:
    """Read the three sets that people described, one after another, in the order of their files.

    An image has the name of the field `image` or `image/key`, with or without `.jpg`.

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    images, captions = [], []
    for name, place in SETS.items():
        for number, row in enumerate(read_json_lines(folder / name / "data.jsonl"), 1):
            where = f"row {number} of {name}"
            image = text_field(row, "image" if "image" in row else "image/key", where)
            images.append(folder / place / (image if image.endswith(".jpg") else f"{image}.jpg"))
            captions.append([text_field(row, "IIW", where)])
    return RetrievalData.from_captions(BenchmarkImages(images).require_files(TITLE), captions)


BENCHMARKS = [
    Benchmark(
        name="iiw",
        title=TITLE,
        groups=("long",),
        folder="imageinwords",
        marker="IIW-400/data.jsonl",
        more_markers=("DOCCI_Test/data.jsonl", "DCI_Test/data.jsonl"),
        files="DOCCI_Test, IIW-400 and DCI_Test with data.jsonl; images in docci, docci_aar and dci",
        counts={"images": 612, "texts": 612},
        license="CC BY 4.0 (descriptions), of DOCCI and SA-1B (images)",
        source="The descriptions are in the repository imageinwords of Google, the images in DOCCI and DCI.",
        read=read,
        protocol=RetrievalProtocol(),
    )
]
