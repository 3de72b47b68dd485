"""The options with which a golden model of the original is converted, and conversions that are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llm2clip import cli
from tests.llm2clip.convert import checkpoints
from tests.llm2clip.convert.checkpoints import EVA

Refused = Callable[..., None]


@pytest.fixture
def eva_options(tmp_path: Path) -> list[str]:
    llm = checkpoints.llm_of(EVA, tmp_path / "llm")
    return ["--model-config", checkpoints.model_config(EVA, tmp_path), "--text-model", llm]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Check that a conversion is refused with a message that fits a pattern, however its lines break."""

    def check(pattern: str, *arguments: str | Path) -> None:
        capfd.readouterr()
        assert cli.main(["convert", *map(str, arguments)]) == 2
        printed = capfd.readouterr()
        assert re.search(pattern, " ".join(printed.err.split())), printed.err
        assert "Traceback" not in printed.err
        assert "code ran" not in printed.out

    return check
