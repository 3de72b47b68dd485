"""Winoground: pairs of images and of captions that consist of the same words in another order."""

from __future__ import annotations

from pathlib import Path

import datasets

from llm2clip.data.opened_table import open_table
from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.data import BenchmarkImages, PairData
from llm2clip.evaluation.reading import read_json_lines, text_field

TITLE = "Winoground"
EXAMPLES = ("examples.jsonl", "data/examples.jsonl")
PARQUET = ("data/test-*.parquet", "test-*.parquet")
SAVED = ("dataset_info.json", "dataset_dict.json")
IMAGES = ("image_0", "image_1")
CAPTIONS = ("caption_0", "caption_1")
KIND = "collapsed_tag"


def read(folder: Path) -> PairData:
    """Read the files of the Hub (`examples.jsonl` and `images`), parquet files, or what `save_to_disk` wrote.

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    found = [folder / name for name in EXAMPLES if (folder / name).is_file()]
    if found:
        rows = read_json_lines(found[0])
    else:
        table = open_table(_table_path(folder), None, "test", None).table
        missing = sorted({*IMAGES, *CAPTIONS} - set(table.column_names or []))
        if missing:
            raise BenchmarkError(f"the table in {folder} has no column {', '.join(missing)}.")
        for column in IMAGES:
            table = table.cast_column(column, datasets.Image(decode=False))
        rows = list(table)
    places = [f"row {number} of {TITLE}" for number in range(len(rows))]
    texts = [text_field(row, name, place) for row, place in zip(rows, places, strict=True) for name in CAPTIONS]
    kinds = [str(row.get(KIND) or "all") for row in rows]
    if not found:
        keys = [f"{place}, {name}" for place in places for name in IMAGES]
        return PairData(BenchmarkImages([row[name]["bytes"] for row in rows for name in IMAGES], keys), texts, kinds)
    names = [text_field(row, name, place) for row, place in zip(rows, places, strict=True) for name in IMAGES]
    paths = [found[0].parent / "images" / (name if Path(name).suffix else f"{name}.png") for name in names]
    return PairData(BenchmarkImages(paths).require_files(TITLE), texts, kinds)


def _table_path(folder: Path) -> str:
    pattern = next((pattern for pattern in PARQUET if any(folder.glob(pattern))), None)
    return str(folder if pattern is None else folder / pattern)


BENCHMARKS = [
    Benchmark(
        name="winoground",
        title=TITLE,
        groups=("composition",),
        folder="winoground",
        needs=((*EXAMPLES, *(f"./{name}" for name in (*PARQUET, *SAVED))),),
        files="examples.jsonl and images/NAME.png, also below data; or parquet files; or a folder of save_to_disk",
        counts={"pairs": 400},
        license="Winoground license of Meta, for research; the images are of Getty Images",
        source="The gated data set winoground of Facebook on the Hub, once its terms are accepted there.",
        read=read,
        protocol="pair-scores",
    )
]
