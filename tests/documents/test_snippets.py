"""The Python that the documents show runs, block after block, and prints what they show."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, TorchAoConfig

from tests.documents.reading import DOCUMENTS, ROOT, blocks, kind
from tests.documents.stand_ins import FILES, FOLDERS, MODEL

WITH_PYTHON = [document for document in DOCUMENTS if "```python" in (ROOT / document).read_text()]


def quantization(**settings: Any) -> TorchAoConfig:
    """bitsandbytes needs an accelerator: its settings are read, and torchao quantises in its place."""
    BitsAndBytesConfig(**settings)
    return TorchAoConfig(Int8WeightOnlyConfig())


# Names that the snippets use without defining them.
PROVIDED = {"README.md": {"repo": MODEL, "torch": torch, "BitsAndBytesConfig": quantization}}


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_runs(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / MODEL).mkdir(parents=True)
    FOLDERS[MODEL](tmp_path / MODEL)
    for name in ("examples", "photo.jpg"):
        FILES[name](tmp_path / name)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    session = "\n".join(content for language, content in blocks(document) if kind(language, content) == "python")
    Path("session.py").write_text(session)
    runpy.run_path("session.py", init_globals=PROVIDED.get(document))
    printed = capsys.readouterr().out
    for _, content in blocks(document):
        if content.startswith("{"):
            shown, now = ast.literal_eval(content), ast.literal_eval(printed.splitlines()[0])
            assert list(shown) == list(now)
            assert sum(now.values()) == pytest.approx(1, abs=0.002)
