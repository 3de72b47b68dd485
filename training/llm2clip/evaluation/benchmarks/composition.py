"""Readers of pairs that differ little: MMVP-VLM, SugarCrepe's captions with a hard negative, two captions of CRA."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch

from llm2clip.evaluation.benchmarks.captions import find_images
from llm2clip.evaluation.benchmarks.parquet import Parquet
from llm2clip.evaluation.data import CaptionPairData, HardNegativeData, PairData
from llm2clip.evaluation.reading import read_json, read_text

SUGAR_CREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def read_mmvp(folder: Path) -> PairData:
    """Read the pairs: rows of number, pattern and statement, two by two; the odd number is that of the first image."""
    text = read_text(folder / "Questions.csv")
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row][1:]
    images, texts, kinds = [], [], []
    for pair in zip(rows[::2], rows[1::2], strict=True):
        for number, pattern, statement in sorted(pair, key=lambda row: int(row[0])):
            images.append(f"MLLM_VLM Images/{pattern.strip()}/{int(number)}.jpg")
            texts.append(statement)
        kinds.append(pair[0][1].strip())
    return PairData(find_images(folder, images), texts, kinds)


def read_sugar_crepe(folder: Path) -> HardNegativeData:
    """Read the seven files, each in its order; the keys of a file are names, not positions."""
    rows = [(kind, row) for kind in SUGAR_CREPE for row in read_json(folder / f"sugar_crepe/{kind}.json").values()]
    names = [row["filename"] for _, row in rows]
    positions = {name: position for position, name in enumerate(dict.fromkeys(names))}
    return HardNegativeData(
        images=find_images(folder, list(positions), ["val2017"]),
        owners=torch.tensor([positions[name] for name in names], dtype=torch.int64),
        right=[row["caption"] for _, row in rows],
        wrong=[row["negative_caption"] for _, row in rows],
        kinds=[kind for kind, _ in rows],
    )


def read_caption_pairs(folder: Path, captions: Parquet) -> CaptionPairData:
    """Read the first two captions of each image; images are not needed."""
    texts = captions.captions(captions.table(folder))
    return CaptionPairData([some[0] for some in texts], [some[1] for some in texts])
