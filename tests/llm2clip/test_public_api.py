"""The public API: what `import llm2clip` offers, what it costs, and that the documents use nothing else."""

from __future__ import annotations

import ast
import json
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
NAMES = set(llm2clip.__all__) - {"__version__"}
# Prints the CPU seconds of a process, which heavy libraries it has loaded, and what `dir` lists.
MEASURE = """
import json, resource, sys
usage = resource.getrusage(resource.RUSAGE_SELF)
heavy = sorted({"torch", "transformers", "datasets", "numpy", "PIL"} & set(sys.modules))
print(json.dumps([usage.ru_utime + usage.ru_stime, heavy, dir(sys.modules.get("llm2clip"))]))
"""


def measure(code: str) -> tuple[float, list[str], list[str]]:
    """CPU seconds of an interpreter that runs some code, the best of three, the libraries that it loads, and names."""
    command = [sys.executable, "-c", code + MEASURE]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    return min(seconds for seconds, _, _ in runs), *runs[0][1:]


def test_import_of_the_package_is_cheap_and_lists_the_public_names() -> None:
    bare, _, _ = measure("")
    seconds, loaded, listed = measure("import llm2clip")
    assert loaded == []
    assert seconds - bare < 0.1
    assert set(llm2clip.__all__) <= set(listed)


def test_public_names_are_imported_on_first_use() -> None:
    assert [name for name in NAMES if getattr(llm2clip, name).__name__ != name] == []
    modules = {path.stem for path in Path(llm2clip.__file__).parent.iterdir()}
    assert modules.isdisjoint(NAMES), "a name of the API would be hidden by a module"
    with pytest.raises(AttributeError, match="Stage3Trainer"):
        llm2clip.Stage3Trainer  # noqa: B018


def test_stub_and_api_page_are_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert STUB.read_text(encoding="utf-8") == made["stub"](), "run `python docs/make_api.py`"
    assert page == made["with_tables"](page), "run `python docs/make_api.py`"
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == NAMES


def inner_imports(source: str) -> list[str]:
    """What some code imports from the two packages that is not of the public API."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if re.match(r"(modeling_)?llm2clip\.", alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.module == "llm2clip":
            found += [alias.name for alias in node.names if alias.name not in llm2clip.__all__]
        elif isinstance(node, ast.ImportFrom) and re.match(r"(modeling_)?llm2clip\.", node.module or ""):
            found.append(str(node.module))
    return found


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


@pytest.mark.parametrize("code", shown_code())
def test_documents_and_examples_import_only_the_public_api(code: str) -> None:
    assert inner_imports(code) == []
