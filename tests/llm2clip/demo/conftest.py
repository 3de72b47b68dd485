"""A gallery and indexes of bundled images, embedded by a tiny model, and demos that are served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from llm2clip import cli
from llm2clip.demo.gallery import Gallery
from llm2clip.search.index import IndexConfig, run
from llm2clip.search.table_items import TableImages
from tests.builders import small_runs as training

Serve = Callable[..., None]
NUM_IMAGES = 30


def bundled_images(count: int = NUM_IMAGES) -> TableImages:
    """The first bundled images."""
    return TableImages(f"{training.CONCEPTS}/test.parquet", split=f"test[:{count}]")


def index_bundled(folder: Path, model: Path, count: int = 6, **settings: Any) -> str:
    """Index the first bundled images, or their captions; return the path of the index."""
    data = str(bundled_images(count).source["path"])
    settings = {"output_dir": str(folder), "split": f"test[:{count}]", "num_workers": 0, **settings}
    run(IndexConfig(folder=data, model=str(model), **settings))
    return str(folder)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Serve a demo with some options, while a function visits its address."""

    def serve(visit: Callable[[str], None], *options: str) -> None:
        monkeypatch.setattr(gr.Blocks, "block_thread", lambda page: visit(page.local_url))
        assert cli.main(["demo", *options, "--cache-dir", str(tmp_path / "cache")]) == 0

    return serve


@pytest.fixture(scope="session")
def gallery(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery.open(str(saved_model), bundled_images(), tmp_path_factory.mktemp("cache"))
