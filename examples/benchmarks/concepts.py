"""A benchmark of one's own: the bundled pictures of concepts and their captions, by the strict rule of published sets.

Run: llm2clip evaluate runs/quickstart/llm2clip --benchmark examples/benchmarks/concepts.py --data examples/data
"""

from pathlib import Path

import datasets

from llm2clip import Benchmark, BenchmarkImages, RetrievalData


def read(folder: Path) -> RetrievalData:
    """Read `test.parquet`: a picture, its key and its caption in each row."""
    rows = datasets.Dataset.from_parquet(str(folder / "test.parquet"), keep_in_memory=True)
    rows = rows.cast_column("image", datasets.Image(decode=False))
    images = BenchmarkImages([image["bytes"] for image in rows["image"]], list(rows["key"]))
    return RetrievalData.from_captions(images, [[caption] for caption in rows["caption"]])


BENCHMARKS = [
    Benchmark(
        name="concepts",
        title="Concepts",
        groups=(),
        folder="concepts",
        needs=("test.parquet",),
        files="test.parquet with the columns key, image and caption",
        counts={"images": 695, "texts": 695},
        license="of each picture, in the column license",
        source="The folder examples/data/concepts of this repository.",
        read=read,
        protocol="retrieval",
        note="Several pictures have the same caption, which is then right for one of them alone.",
    )
]
