"""A gallery of bundled images, embedded by a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm2clip.data import CaptionSource
from llm2clip.demo.gallery import Gallery
from tests.llm2clip import tiny as training
from tests.modeling_llm2clip import tiny

NUM_IMAGES = 30


def source(num_images: int = NUM_IMAGES) -> CaptionSource:
    return CaptionSource(f"{training.CONCEPTS}/test.parquet", max_samples=num_images)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny.save(folder)
    return folder


@pytest.fixture(scope="session")
def gallery(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return Gallery.open(str(model_folder), source(), tmp_path_factory.mktemp("cache"))
