"""The Python code in every document runs, one block after the other, and prints what the document shows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.documents.reading import DOCUMENTS, ROOT, blocks
from tests.documents.sessions import prepare, python_of, run_code

# What tests/llm2clip/encoders/test_ray_engine.py, tests/llm2clip/serving/test_serve.py,
# tests/llm2clip/trainers/test_keep_images.py and tests/documents/test_training_pages.py run.
ELSEWHERE = {"docs/keep_index.md", "docs/scaling.md", "docs/serve.md", "docs/train/frozen.md", "docs/train/trainer.md"}
WITH_PYTHON = [document for document in DOCUMENTS if "```python" in (ROOT / document).read_text()]
WITH_PYTHON = [document for document in WITH_PYTHON if document not in ELSEWHERE]


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_code_of_the_document_runs(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    run_code(python_of(document))
    printed = capsys.readouterr().out
    for _, content in blocks(document):
        if content.startswith("{"):
            shown, now = ast.literal_eval(content), ast.literal_eval(printed.splitlines()[0])
            assert list(shown) == list(now)
            assert sum(now.values()) == pytest.approx(1, abs=0.002)
