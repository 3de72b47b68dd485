"""Parquet files of sets on the Hub: the columns that they have, others beside them included."""

from __future__ import annotations

import io
from typing import Any

import datasets

from tests.llm2clip.evaluation.benchmarks.samples import picture

IMAGE = datasets.Image()


def parquet(columns: dict[str, list[Any]]) -> bytes:
    """The file of some columns; those of bytes are images, as `datasets` writes them."""
    are_images = {name: isinstance(values[0], bytes) for name, values in columns.items()}
    values = {
        name: [{"bytes": value, "path": None} for value in column] if are_images[name] else column
        for name, column in columns.items()
    }
    table = datasets.Dataset.from_dict(values)
    for name in filter(are_images.get, columns):
        table = table.cast_column(name, IMAGE)
    stream = io.BytesIO()
    table.to_parquet(stream)
    return stream.getvalue()


def coco(captions: dict[int, list[str]], ids: dict[int, list[int]] | None = None) -> bytes:
    """The Karpathy split with ids: captions of an image by its id, and their ids, by default from 10 on."""
    numbered = {
        image: list(range(10 * row, 10 * row + len(texts))) for row, (image, texts) in enumerate(captions.items(), 1)
    }
    rows = list(captions)
    return parquet(
        {
            "image": [picture((10 * row + 1) % 256) for row in range(len(rows))],
            "filepath": ["val2014"] * len(rows),
            "sentids": [(ids or numbered)[image] for image in rows],
            "filename": [f"COCO_val2014_{image:012}.jpg" for image in rows],
            "split": ["test"] * len(rows),
            "sentences_raw": list(captions.values()),
            "cocoid": rows,
            "th_sentences_raw": [["not this"]] * len(rows),
        }
    )


def docci(captions: dict[str, str]) -> bytes:
    return parquet(
        {
            "image": [picture(20 * row + 2) for row in range(len(captions))],
            "example_id": list(captions),
            "description": list(captions.values()),
        }
    )


def winoground(captions: list[tuple[str, str]], kinds: list[str]) -> bytes:
    columns: dict[str, list[Any]] = {"id": list(range(len(captions)))}
    for side in (0, 1):
        columns[f"image_{side}"] = [picture(40 * row + 4 * side) for row in range(len(captions))]
        columns[f"caption_{side}"] = [pair[side] for pair in captions]
    return parquet(columns | {"tag": ["x"] * len(captions), "collapsed_tag": kinds})


def cifar(shades: list[int], labels: list[int], label: str = "label") -> bytes:
    coarse = {} if label == "label" else {"coarse_label": [0] * len(labels)}
    return parquet({"img": [picture(shade) for shade in shades], label: labels, **coarse})
