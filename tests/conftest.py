"""Every test runs offline, on one thread, and from a known random state."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import set_seed

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    set_seed(0)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Archives hold the second they were made in, which in a test's name makes two workers collect different tests."""
    return f"{len(val)}-bytes" if isinstance(val, bytes) else None
