"""A gallery of bundled images, embedded by a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm2clip.demo.gallery import Gallery
from llm2clip.search.table_items import TableImages
from tests.builders import small_runs as training
from tests.builders import tiny

NUM_IMAGES = 30


def bundled_images(count: int = NUM_IMAGES) -> TableImages:
    """The first bundled images."""
    return TableImages(f"{training.CONCEPTS}/test.parquet", split=f"test[:{count}]")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny.save(folder)
    return folder


@pytest.fixture(scope="session")
def gallery(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery.open(str(model_folder), bundled_images(), tmp_path_factory.mktemp("cache"))
