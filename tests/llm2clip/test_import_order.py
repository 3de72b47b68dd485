"""A subpackage imports only from those above it in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.documents.reading import ROOT

PACKAGE = ROOT / "training" / "llm2clip"
TABLE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| subpackage |")[1].split("\n\n")[0]
SUBPACKAGES = re.findall(r"^\| `(\w+)` \|", TABLE, re.MULTILINE)
FILES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"})


def subpackage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """The modules that a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "llm2clip":
            found += [f"llm2clip.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


def test_contributing_describes_every_subpackage() -> None:
    assert {subpackage_of(path) for path in FILES} == set(SUBPACKAGES)


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_a_subpackage_imports_only_from_those_above(name: str) -> None:
    allowed = SUBPACKAGES[: SUBPACKAGES.index(name) + 1]
    files = [path for path in FILES if subpackage_of(path) == name]
    assert files
    for path in files:
        own = [name.split(".")[1:2] for name in imported(path) if name.split(".")[0] == "llm2clip"]
        assert [name for name in own if not set(name) & set(allowed)] == [], path


def test_no_files_import_each_other_in_a_circle() -> None:
    """Neither at the top of a file nor inside a function."""
    dotted = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES}
    modules = {name.removesuffix(".__init__"): path for path, name in dotted.items()}
    graph = {module: [name for name in imported(path) if name in modules] for module, path in modules.items()}
    assert len(tuple(TopologicalSorter(graph).static_order())) == len(modules) > 200


def test_model_package_does_not_import_the_toolbox() -> None:
    files = list((ROOT / "modeling_llm2clip").glob("*.py"))
    assert len(files) > 10
    assert [path for path in files if any(name.split(".")[0] == "llm2clip" for name in imported(path))] == []


@pytest.mark.parametrize(("name", "other"), [("benchmarks", "protocols"), ("protocols", "benchmarks")])
def test_benchmarks_and_protocols_do_not_import_each_other(name: str, other: str) -> None:
    files = sorted((PACKAGE / "evaluation" / name).glob("*.py"))
    assert len(files) > 3
    for path in files:
        assert [name for name in imported(path) if name.startswith(f"llm2clip.evaluation.{other}")] == [], path
