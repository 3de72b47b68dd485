"""The commands in hub_configs/README.md that train the text towers of its configs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.documents.cases import CASES
from tests.documents.reader import Reader
from tests.documents.reading import ROOT

FOLDER = ROOT / "hub_configs"
ROWS = re.findall(r"^\| \[([^]]+)\].*`(llm2clip stage1 [^`]+)`", (FOLDER / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("name", "line"), ROWS)
def test_stage_1_gives_the_text_tower_of_the_config(name: str, line: str, reader: Reader, tmp_path: Path) -> None:
    reader.run(CASES[line], tmp_path)
    trained, documented = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "runs/stage1", FOLDER / name)
    )
    for key in ("prompt_prefix", "prompt_suffix", "pooling", "max_text_length", "bidirectional"):
        assert trained[key] == documented[key], key
