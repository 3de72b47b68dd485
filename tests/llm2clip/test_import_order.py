"""A room of the package imports only from the rooms above it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import llm2clip

PACKAGE = Path(llm2clip.__file__).parent
# From the lowest floor up; CONTRIBUTING.md describes each room.
ROOMS = [
    "utils",
    "recipes",
    "store",
    "data",
    "checks",
    "losses",
    "encoders",
    "evaluation",
    "hub",
    "trainers",
    "convert",
    "planning",
    "search",
    "serving",
    "verification",
    "demo",
    "quickstart",
    "cli",
    "__main__",
]


def upward_imports(path: Path) -> list[str]:
    """The imports of a file that lead to a higher room than its own, inside functions too."""
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if node.module == "llm2clip":
                modules = [f"llm2clip.{alias.name}" for alias in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "llm2clip" and (len(parts) == 1 or ROOMS.index(parts[1]) > ROOMS.index(room)):
                found.append(f"line {node.lineno} imports {module}")
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_file_imports_only_from_rooms_above(path: Path) -> None:
    assert upward_imports(path) == []


def test_every_room_is_in_the_order() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert rooms - {"__init__"} == set(ROOMS)


def test_model_package_does_not_import_the_toolbox() -> None:
    folder = PACKAGE.parents[1] / "modeling_llm2clip"
    assert folder.is_dir()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "llm2clip" for name in names), path


def test_contributing_describes_the_rooms_in_their_order() -> None:
    page = (PACKAGE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.split("| room |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == ROOMS
