"""The extra named by an error message installs every library that the command imports, also inside functions."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from importlib.util import resolve_name
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llm2clip import cli
from tests.documents.reading import ROOT

OWN = {"llm2clip": ROOT / "training" / "llm2clip", "modeling_llm2clip": ROOT / "modeling_llm2clip"}
# The extra of a library that a command imports only where a setting asks for it; the error then names that extra.
ON_DEMAND = {
    "eccv_caption": "eval", "lancedb": "search", "open_clip": "eval", "pgvector": "search", "pillow_heif": "search",
    "psycopg": "search", "ray": "all", "sentence_transformers": "eval",
}  # fmt: skip


def imports(source: Path, package: str) -> set[str]:
    """The modules that a file imports anywhere, by their full names; of `from a import b` both, where b may be one."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


@cache
def of_module(module: str) -> frozenset[str]:
    """What a module of this package imports; nothing where the name is that of something in a module."""
    top, *rest = module.split(".")
    place = OWN[top].joinpath(*rest)
    if place.is_dir():
        return frozenset(imports(place / "__init__.py", module))
    source = place.with_suffix(".py")
    return frozenset(imports(source, module.rpartition(".")[0])) if source.is_file() else frozenset()


def needed(modules: set[str]) -> set[str]:
    """The top-level modules of other packages that some modules lead to."""
    seen: set[str] = set()
    others = set()
    todo = set(modules)
    while todo:
        module = todo.pop()
        top = module.partition(".")[0]
        if top not in OWN:
            others.add(top)
        elif module not in seen:
            seen.add(module)
            todo |= {module.rpartition(".")[0] or module, *of_module(module)}
    return others - set(sys.stdlib_module_names)


@cache
def installed_by(*extras: str) -> set[str]:
    """The distributions that an installation with some extras has, as far as they are installed here."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    parts = setup["options.extras_require"]
    todo = [Requirement(line) for line in setup["options"]["install_requires"].splitlines() if line]
    todo.append(Requirement(f"llm2clip[{','.join(extras)}]"))
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        wanted = todo.pop()
        entry = (normal(wanted.name), frozenset(wanted.extras))
        if entry in seen:
            continue
        seen.add(entry)
        if wanted.name == "llm2clip":
            todo += [Requirement(line) for extra in wanted.extras for line in parts[extra].splitlines() if line]
            continue
        try:
            lines = requires(wanted.name) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*wanted.extras, "")):
                todo.append(requirement)
    return {name for name, _ in seen}


@cache
def distributions() -> Mapping[str, list[str]]:
    """The distributions of each top-level module."""
    return packages_distributions()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def missing(modules: set[str], *extras: str) -> set[str]:
    """Those of some modules that an installation lacks."""
    have, owners = installed_by(*extras), distributions()
    return {module for module in modules if not {normal(owner) for owner in owners.get(module, [module])} & have}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_extra_of_a_command_installs_every_library_it_imports(name: str) -> None:
    command = cli.COMMANDS[name]
    modules = needed({"llm2clip.cli", command.module})
    assert "torch" in modules
    assert missing(modules), "the base installation would do"
    lacking = missing(modules, command.extra)
    assert lacking <= set(ON_DEMAND)
    assert not missing(lacking, *(ON_DEMAND[module] for module in lacking))


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_example_needs_only_what_the_quickstart_installs(script: str) -> None:
    modules = needed(imports(ROOT / "examples" / script, "")) - {"common"}
    assert not missing(modules - set(ON_DEMAND), "train")


def test_error_about_a_missing_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs/quickstart/llm2clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gradio", None)
    # Another test of this process may have imported it while gradio was there.
    monkeypatch.delitem(sys.modules, "llm2clip.demo.interface", raising=False)
    assert cli.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'llm2clip[demo]' installs what llm2clip demo needs" in error
