"""The public API: what `import llm2clip` offers, what it costs, and that the documents use nothing else."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llm2clip
from tests.documents.reading import DOCUMENTS, ROOT, blocks

STUB = Path(llm2clip.__file__).with_suffix(".pyi")
MAKE_API = str(ROOT / "docs" / "make_api.py")
NAMES = sorted(set(llm2clip.__all__) - {"__version__"})
PACKAGES = ("llm2clip", "modeling_llm2clip")
HEAVY = ("torch", "transformers", "datasets", "numpy", "PIL")
# Prints the CPU seconds of a process, and which heavy libraries it has loaded.
MEASURE = f"""
import json, resource, sys
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([usage.ru_utime + usage.ru_stime, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def measure(code: str, times: int = 3) -> tuple[float, list[str]]:
    """CPU seconds of an interpreter that runs some code, the best of some, and the heavy libraries it has loaded."""
    runs = []
    for _ in range(times):
        shown = subprocess.run([sys.executable, "-c", code + MEASURE], check=True, capture_output=True, text=True)
        runs.append(json.loads(shown.stdout))
    return min(seconds for seconds, _ in runs), runs[0][1]


def imports(source: str) -> list[tuple[str, list[str]]]:
    """The modules that some code imports, each with the names that it takes from there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module or "", [alias.name for alias in node.names]))
    return found


def inner_imports(source: str) -> list[str]:
    """The imports of some code that are not of the public API."""
    return [
        " ".join([module, *names])
        for module, names in imports(source)
        if module.split(".")[0] in PACKAGES
        and ("." in module or (module == "llm2clip" and not set(names) <= set(llm2clip.__all__)))
    ]


def shown_code() -> Iterator[Any]:
    """The Python that users read: examples, the notebook, and the snippets of all documents, cards included."""
    for script in sorted((ROOT / "examples").glob("*.py")):
        yield pytest.param(script.read_text(encoding="utf-8"), id=script.name)
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        yield pytest.param(code, id=notebook.name)
    for document in DOCUMENTS:
        code = "\n".join(content for language, content in blocks(document) if language == "python")
        if code:
            yield pytest.param(code, id=document)


def test_stub_file_declares_the_names_of_the_lazy_table() -> None:
    declared = {
        name: module for module, names in imports(STUB.read_text(encoding="utf-8")) for name in names if module
    }
    assert declared == {name: module for module, names in llm2clip.MODULES.items() for name in names}
    assert STUB.read_text(encoding="utf-8") == runpy.run_path(MAKE_API)["stub"](), "run `python docs/make_api.py`"


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_imported_on_first_use(name: str) -> None:
    assert getattr(llm2clip, name).__name__ == name


def test_no_public_name_is_that_of_a_room() -> None:
    rooms = {path.stem for path in Path(llm2clip.__file__).parent.iterdir()}
    assert not rooms & set(llm2clip.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'llm2clip' has no attribute 'Stage3Trainer'"):
        llm2clip.Stage3Trainer  # noqa: B018


def test_import_of_the_package_is_cheap() -> None:
    bare, _ = measure("")
    seconds, loaded = measure("import llm2clip")
    assert loaded == []
    assert seconds - bare < 0.1
    assert measure("import llm2clip; llm2clip.top_k", times=1)[1] != []


def test_dir_lists_public_names_before_they_are_imported() -> None:
    code = "import json, llm2clip; print(json.dumps(dir(llm2clip)))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    assert set(llm2clip.__all__) <= set(json.loads(shown.stdout))


@pytest.mark.parametrize("code", shown_code())
def test_documents_and_examples_import_only_the_public_api(code: str) -> None:
    assert inner_imports(code) == []


def test_import_of_an_inner_module_is_noticed() -> None:
    code = "from llm2clip.losses import clip_loss\nfrom llm2clip import cli\nimport llm2clip.data\nimport torch"
    assert inner_imports(code) == ["llm2clip.losses clip_loss", "llm2clip cli", "llm2clip.data"]
    assert inner_imports("from llm2clip import clip_loss\nimport modeling_llm2clip") == []


def test_api_page_is_up_to_date() -> None:
    page = ROOT / "docs" / "api.md"
    made = runpy.run_path(MAKE_API)["with_tables"](page.read_text(encoding="utf-8"))
    assert made == page.read_text(encoding="utf-8"), "run `python docs/make_api.py`"
    assert set(re.findall(r"^\| `(\w+)` \|", made, re.MULTILINE)) == set(NAMES)
