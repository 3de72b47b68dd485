"""Small pictures and tables, and the commands `llm2clip index` and `llm2clip search`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip import cli
from llm2clip.search.index import IndexConfig, run
from llm2clip.search.search_index import SearchIndex
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModelWithProjection
from tests.builders import tiny

Model = tuple[Path, LLM2CLIPModel]
# One query of the width of the tiny model.
QUERY = np.ones((1, 24), np.float32) / 24**0.5
# What `llm2clip index` counts; of captions, `captions` in place of `images`.
COUNTS = ("embedded", "kept", "removed", "failed")


def picture(seed: int) -> Image.Image:
    """Generate coarse noise, which differs enough for a tower of 28 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def index(source: Path | str, model: Path | str, output: Path | str | None, **settings: Any) -> tuple[int, ...]:
    """Run `llm2clip index`; return its counts."""
    place = {} if output is None else {"output_dir": str(output)}
    reads = {} if settings.get("embed") == "caption" else {"num_workers": 0}
    settings = {**reads, "batch_size": 4, **place, **settings}
    result = run(IndexConfig(folder=str(source), model=str(model), **settings))
    return (*(result[name] for name in COUNTS), result["captions" if "captions" in result else "images"])


def rows(folder: Path | str) -> list[dict[str, Any]]:
    """The rows of an index with their embeddings, in the order of the data."""
    return stored_rows(SearchIndex.open(folder))


def stored_rows(index: SearchIndex) -> list[dict[str, Any]]:
    """The rows of an open index with their embeddings, in the order of the data."""
    query = np.ones((1, index.manifest.width), np.float32)
    found = index.store.search(query, len(index))[0].to_pylist()
    place = ("row", "key", "caption_column", "caption_number")
    return sorted(found, key=lambda row: [(row.get(name) is None, row.get(name)) for name in place])


def embeddings(output: Path) -> dict[str, np.ndarray]:
    """The embeddings of an index by key."""
    return {row["key"]: np.asarray(row["vector"], dtype=np.float16) for row in rows(output)}


def as_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[dict[str, Any]]:
    """Return the queries in the output of `llm2clip search --json`."""
    capsys.readouterr()
    assert cli.main(["search", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["queries"]


def error(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Return the error message of a command."""
    capsys.readouterr()
    assert cli.main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def refuse_llm(patch: pytest.MonkeyPatch) -> None:
    """Let no LLM be built from now on."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the LLM was built")

    patch.setattr(LLM2CLIPTextModel, "__init__", refuse)


def save_table(path: Path, seeds: list[int], **columns: list[Any]) -> Path:
    """Write a parquet file of pictures."""
    table = datasets.Dataset.from_dict({"image": [{"bytes": encoded(picture(seed)), "path": None} for seed in seeds]})
    for name, values in columns.items():
        table = table.add_column(name, values)
    table.cast_column("image", datasets.Image()).to_parquet(path)
    return path


def save_broken(folder: Path, part: str) -> Path:
    """Save a tiny model of which one weight is NaN, as after a training that diverged."""
    model = tiny.save(folder)
    torch.nn.init.constant_(model.get_submodule(part).weight, float("nan"))
    model.save_pretrained(folder)
    return folder


def save_vision_half(model: Path, folder: Path) -> Path:
    LLM2CLIPVisionModelWithProjection.from_pretrained(model).save_pretrained(folder)
    tiny.processor().image_processor.save_pretrained(folder)
    return folder
