"""Every test runs offline, on one thread, and from a known random state."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import set_seed

torch.set_num_threads(1)

# The tests of a file run one after the other: begun last, one of these would keep the other process waiting.
LONGEST = [
    f"tests/{name}.py"
    for name in (
        *("llm2clip/quickstart/test_real_weights", "documents/test_commands", "llm2clip/trainers/test_every_setting"),
        *("llm2clip/search/test_memory", "llm2clip/trainers/test_sharded", "llm2clip/trainers/test_stopping"),
        "llm2clip/trainers/test_engines",
        *("llm2clip/convert/test_full_size", "llm2clip/trainers/test_stage2", "llm2clip/trainers/test_distill"),
        *("llm2clip/trainers/test_stage2_captions", "damaged/test_damaged", "llm2clip/hub/test_card_snippets"),
        *("llm2clip/hub/test_build", "llm2clip/quickstart/test_quickstart", "llm2clip/serving/test_serve"),
        *("llm2clip/hub/test_export_onnx", "test_packaging"),
    )
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    set_seed(0)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Archives hold the second they were made in, which in a test's name makes two workers collect different tests."""
    return f"{len(val)}-bytes" if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONGEST)))


def pytest_collection_finish() -> None:
    """Look for garbage outside of the libraries only: in them, each search by a Trainer takes half a second."""
    gc.collect()
    gc.freeze()
