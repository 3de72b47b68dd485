"""A tiny model, folders of small pictures, and damaged files."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psycopg
import pytest
import torch
from PIL import Image

from llm2clip import cli
from llm2clip.encoders.ours import OurEncoder
from llm2clip.search.index import IndexConfig, run
from llm2clip.search.search_index import SearchIndex
from llm2clip.utils.remote_path import open_path
from modeling_llm2clip import LLM2CLIPModel
from tests.modeling_llm2clip import tiny
from tests.postgres import postgres_server


def picture(seed: int) -> Image.Image:
    """Generate coarse noise, which differs enough for a tower of 28 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def header_bomb() -> bytes:
    """Return a PNG whose header claims 200,000 x 200,000 pixels."""
    data = bytearray(encoded(picture(0)))
    data[16:24] = (200_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


COUNTS = ("embedded", "kept", "removed", "failed", "images")


def index(folder: Path | str, model: Path, output: Path | str, **settings: Any) -> tuple[int, ...]:
    """Run `llm2clip index`; return its counts."""
    settings = {"num_workers": 0, "batch_size": 4, **settings}
    result = run(IndexConfig(folder=str(folder), model=str(model), output_dir=str(output), **settings))
    return tuple(result[name] for name in COUNTS)


def rows(folder: Path | str) -> list[dict[str, Any]]:
    """The rows of an index with their embeddings, in the order of the table."""
    return stored_rows(SearchIndex.open(folder), "vector")


def stored_rows(index: SearchIndex, *internal: str) -> list[dict[str, Any]]:
    """The rows of an open index, with some of their internal columns, in the order of the store."""
    described = [batch.drop_columns(["_rowid"]) for batch in index.store.keys(None)]
    others = [batch.drop_columns(["_rowid"]) for batch in index.store.keys(internal)]
    found = [[row for batch in batches for row in batch.to_pylist()] for batches in (described, others)]
    return [{**row, **more} for row, more in zip(*found, strict=True)]


def embeddings(output: Path) -> dict[str, np.ndarray]:
    """The embeddings of an index by key."""
    return {row["key"]: np.asarray(row["vector"], dtype=np.float16) for row in rows(output)}


def content(folder: Path | str) -> dict[str, Any]:
    """All that an index says, apart from versions."""
    failures = json.loads((open_path(folder) / "failures.json").read_text())
    return {"rows": rows(folder), "failures": failures, "manifest": SearchIndex.open(folder).manifest.content()}


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


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LLM2CLIPModel]:
    """The folder of a tiny model, and the model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    return folder, tiny.save(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of twelve pictures, at the top and in two subfolders."""
    folder = tmp_path / "pictures"
    for number in range(12):
        path = folder / ("", "a", "b/c")[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number)))
    return folder


class Forwards:
    """The images in each batch that models have embedded; the next run ends after `limit` of them.

    Attributes:
        meanwhile: Called before each batch, with the number of those before.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.limit: int | None = None
        self.meanwhile: Callable[[int], Any] = lambda number: None


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Forwards:
    """What models embed from now on."""
    found, forward = Forwards(), OurEncoder.forward_images

    def counted(self: OurEncoder, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if found.limit == len(found.sizes):
            raise KeyboardInterrupt
        meanwhile, found.meanwhile = found.meanwhile, lambda number: None  # it may embed images of its own
        meanwhile(len(found.sizes))
        found.meanwhile = meanwhile
        found.sizes.append(len(inputs["pixel_values"]))
        return forward(self, inputs)

    monkeypatch.setattr(OurEncoder, "forward_images", counted)
    return found


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with postgres_server() as url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        yield url


@pytest.fixture
def url(server: str) -> str:
    """A database with pgvector and nothing else."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS llm2clip CASCADE")
    return server
