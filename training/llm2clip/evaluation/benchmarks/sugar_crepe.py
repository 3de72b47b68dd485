"""SugarCrepe: COCO images with a caption and a hard negative, in seven files of three kinds."""

from __future__ import annotations

from pathlib import Path

import torch

from llm2clip.evaluation.benchmark import Benchmark
from llm2clip.evaluation.benchmarks.coco import FOLDER, VAL2017_FOLDERS
from llm2clip.evaluation.benchmarks.files import find_images
from llm2clip.evaluation.data import HardNegativeData
from llm2clip.evaluation.reading import read_json, text_field

TITLE = "SugarCrepe"
COUNTS = {
    "add_att": 692,
    "add_obj": 2062,
    "replace_att": 788,
    "replace_obj": 1652,
    "replace_rel": 1406,
    "swap_att": 666,
    "swap_obj": 245,
}
FILES = tuple(f"sugar_crepe/{kind}.json" for kind in COUNTS)


def read(folder: Path) -> HardNegativeData:
    """Read the seven files, each in its order; the keys of a file are names, not positions.

    Raises:
        BenchmarkError: A row is broken, or images are missing.
    """
    rows = []
    for kind, file in zip(COUNTS, FILES, strict=True):
        content = read_json(folder / file)
        rows += [(kind, f"row {key!r} of {kind}.json", row) for key, row in content.items()]
    names = [text_field(row, "filename", place) for _, place, row in rows]
    positions = {name: position for position, name in enumerate(dict.fromkeys(names))}
    return HardNegativeData(
        images=find_images(TITLE, folder, list(positions), VAL2017_FOLDERS),
        owners=torch.tensor([positions[name] for name in names], dtype=torch.int64),
        right=[text_field(row, "caption", place) for _, place, row in rows],
        wrong=[text_field(row, "negative_caption", place) for _, place, row in rows],
        kinds=[kind for kind, _, _ in rows],
    )


BENCHMARKS = [
    Benchmark(
        name="sugarcrepe",
        title=TITLE,
        groups=("composition",),
        folder=FOLDER,
        needs=FILES,
        files="sugar_crepe with its seven files add_att.json to swap_obj.json, val2017",
        counts=COUNTS,
        license="MIT (captions), COCO's terms (images)",
        source="The seven files are in the folder data of the repository sugar-crepe; the images are those of COCO.",
        read=read,
        protocol="caption-choice",
        note="The accuracy is the mean of the seven files; those of add, replace and swap stand beside it.",
    )
]
