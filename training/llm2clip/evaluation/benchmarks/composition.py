"""Pairs that differ little: Winoground, MMVP-VLM, and SugarCrepe's captions with a hard negative."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import datasets
import torch

from llm2clip.data.opened_table import open_table
from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.benchmarks.coco import FOLDER, VAL2017_FOLDERS
from llm2clip.evaluation.benchmarks.files import find_images
from llm2clip.evaluation.data import BenchmarkImages, HardNegativeData, PairData
from llm2clip.evaluation.reading import read_json, read_json_lines, read_text

WINOGROUND = "Winoground"
EXAMPLES = ("examples.jsonl", "data/examples.jsonl")
PARQUET = ("data/test-*.parquet", "test-*.parquet")
SAVED = ("dataset_info.json", "dataset_dict.json")
PICTURES = ("image_0", "image_1")
CAPTIONS = ("caption_0", "caption_1")
MMVP = "MMVP-VLM"
QUESTIONS, MMVP_IMAGES = "Questions.csv", "MLLM_VLM Images"
SUGAR_CREPE_COUNTS = {
    "add_att": 692,
    "add_obj": 2062,
    "replace_att": 788,
    "replace_obj": 1652,
    "replace_rel": 1406,
    "swap_att": 666,
    "swap_obj": 245,
}
SUGAR_CREPE_FILES = tuple(f"sugar_crepe/{kind}.json" for kind in SUGAR_CREPE_COUNTS)


def read_winoground(folder: Path) -> PairData:
    """Read the files of the Hub (`examples.jsonl` and `images`), parquet files, or what `save_to_disk` wrote."""
    examples = next((folder / name for name in EXAMPLES if (folder / name).is_file()), None)
    if examples is not None:
        rows = read_json_lines(examples)
        names = [row[name] for row in rows for name in PICTURES]
        paths = [examples.parent / "images" / (name if Path(name).suffix else f"{name}.png") for name in names]
        images = BenchmarkImages(paths).require_files(WINOGROUND)
    else:
        pattern = next((pattern for pattern in PARQUET if any(folder.glob(pattern))), "")
        table = open_table(str(folder / pattern), None, "test", None).table
        for column in PICTURES:
            table = table.cast_column(column, datasets.Image(decode=False))
        rows = list(table)
        keys = [f"row {number} of {WINOGROUND}, {name}" for number in range(len(rows)) for name in PICTURES]
        images = BenchmarkImages([row[name]["bytes"] for row in rows for name in PICTURES], keys)
    texts = [row[name] for row in rows for name in CAPTIONS]
    return PairData(images, texts, [str(row.get("collapsed_tag") or "all") for row in rows])


def read_mmvp(folder: Path) -> PairData:
    """Read the pairs: rows of number, pattern and statement, two by two; the odd number is that of the first image."""
    rows = [row for row in csv.reader(io.StringIO(read_text(folder / QUESTIONS), newline="")) if row][1:]
    images, texts, kinds = [], [], []
    for pair in zip(rows[::2], rows[1::2], strict=True):
        for number, pattern, statement in sorted(pair, key=lambda row: int(row[0])):
            images.append(folder / MMVP_IMAGES / pattern.strip() / f"{int(number)}.jpg")
            texts.append(statement)
        kinds.append(pair[0][1].strip())
    return PairData(BenchmarkImages(images).require_files(MMVP), texts, kinds)


def read_sugar_crepe(folder: Path) -> HardNegativeData:
    """Read the seven files, each in its order; the keys of a file are names, not positions."""
    rows = [
        (kind, row)
        for kind, file in zip(SUGAR_CREPE_COUNTS, SUGAR_CREPE_FILES, strict=True)
        for row in read_json(folder / file).values()
    ]
    names = [row["filename"] for _, row in rows]
    positions = {name: position for position, name in enumerate(dict.fromkeys(names))}
    return HardNegativeData(
        images=find_images("SugarCrepe", folder, list(positions), VAL2017_FOLDERS),
        owners=torch.tensor([positions[name] for name in names], dtype=torch.int64),
        right=[row["caption"] for _, row in rows],
        wrong=[row["negative_caption"] for _, row in rows],
        kinds=[kind for kind, _ in rows],
    )


BENCHMARKS = [
    Benchmark(
        name="mmvp-vlm", title=MMVP, groups=("composition",), folder="mmvp_vlm", needs=(QUESTIONS, MMVP_IMAGES),
        files=f"{QUESTIONS}; {MMVP_IMAGES}/PATTERN/1.jpg to 270.jpg", counts={"pairs": 135, "kinds": 9},
        license="MIT", source="The data set MMVP_VLM on the Hub.", read=read_mmvp, protocol="image-choice",
        note="Nine patterns of 15 pairs: one pair is 0.7 points.",
    ),
    Benchmark(
        name="sugarcrepe", title="SugarCrepe", groups=("composition",), folder=FOLDER, needs=SUGAR_CREPE_FILES,
        files="sugar_crepe with its seven files add_att.json to swap_obj.json, val2017", counts=SUGAR_CREPE_COUNTS,
        license="MIT (captions), COCO's terms (images)",
        source="The seven files are in the folder data of the repository sugar-crepe; the images are those of COCO.",
        read=read_sugar_crepe, protocol="caption-choice",
        note="The accuracy is the mean of the seven files; those of add, replace and swap stand beside it.",
    ),
    Benchmark(
        name="winoground", title=WINOGROUND, groups=("composition",), folder="winoground",
        needs=((*EXAMPLES, *(f"./{name}" for name in (*PARQUET, *SAVED))),),
        files="examples.jsonl and images/NAME.png, also below data; or parquet files; or a folder of save_to_disk",
        counts={"pairs": 400}, license="Winoground license of Meta, for research; the images are of Getty Images",
        source="The gated data set winoground of Facebook on the Hub, once its terms are accepted there.",
        read=read_winoground, protocol="pair-scores",
    ),
]  # fmt: skip
