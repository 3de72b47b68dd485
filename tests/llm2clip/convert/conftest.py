"""The options with which a golden model of the original is converted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.llm2clip.convert import checkpoints
from tests.llm2clip.convert.checkpoints import EVA


@pytest.fixture
def eva_options(tmp_path: Path) -> list[str]:
    llm = checkpoints.llm_of(EVA, tmp_path / "llm")
    return ["--model-config", checkpoints.model_config(EVA, tmp_path), "--text-model", llm]
