"""The Python code in every document runs, one block after the other, and prints what the document shows."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

from tests.documents.reading import DOCUMENTS, ROOT, blocks
from tests.documents.stand_ins import E5, FILES, FOLDERS, HUB, MODEL

# What tests/llm2clip/encoders/test_ray_engine.py and tests/llm2clip/serving/test_serve.py run.
ELSEWHERE = {"docs/scaling.md", "docs/serve.md"}
WITH_PYTHON = [document for document in DOCUMENTS if "```python" in (ROOT / document).read_text()]
WITH_PYTHON = [document for document in WITH_PYTHON if document not in ELSEWHERE]


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_code_of_the_document_runs(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / MODEL).mkdir(parents=True)
    FOLDERS[MODEL](tmp_path / MODEL)
    (tmp_path / E5).mkdir(parents=True)
    HUB[E5](tmp_path / E5)
    for name in ("LLM2CLIP-Openai-L-14-336", "LLM2CLIP-Llama3.2-1B-EVA02-L-14-336"):  # converted checkpoints
        (tmp_path / name).symlink_to(MODEL)
    (tmp_path / "my_photos").mkdir()
    FOLDERS["my_photos"](tmp_path / "my_photos")
    for name in ("examples", "photo.jpg"):
        FILES[name](tmp_path / name)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    session = "\n".join(content for language, content in blocks(document) if language == "python")
    Path("session.py").write_text(session)
    runpy.run_path("session.py")
    printed = capsys.readouterr().out
    for _, content in blocks(document):
        if content.startswith("{"):
            shown, now = ast.literal_eval(content), ast.literal_eval(printed.splitlines()[0])
            assert list(shown) == list(now)
            assert sum(now.values()) == pytest.approx(1, abs=0.002)
