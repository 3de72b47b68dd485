"""The tables of decoders and encoders in docs/models.md."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from transformers import __version__

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "models.md").read_text(encoding="utf-8")
MADE = runpy.run_path(str(DOCS / "make_models.py"))
ROWS = dict(
    re.findall(r"^\| `([\w-]+)` \| [\w, ]*\| (works|works, one text per row|refused: .+) \|$", PAGE, re.MULTILINE)
)
DECODERS = ("bloom", "gemma3_text", "llama", "lfm2", "mamba", "mistral", "qwen3", "qwen3_next")
ENCODERS = ("xlm-roberta", "t5", "deberta-v2", "fnet")


@pytest.mark.skipif(f"The types of transformers {__version__}," not in PAGE, reason="made with other transformers")
def test_the_table_has_every_type_once() -> None:
    untried = re.findall(r"^Not tried, since .*: (.*)\.$", PAGE, re.MULTILINE)
    assert len(untried) == 2
    names = [*ROWS, *re.findall(r"`([\w-]+)`", " ".join(untried))]
    assert sorted(names) == sorted([*MADE["types"](), *MADE["encoder_types"]()]), "run `python docs/make_models.py`"
    assert len(ROWS) > 130


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_rows_are_true(name: str) -> None:
    assert MADE["outcome"](name) == ROWS[name]
