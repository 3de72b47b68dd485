"""Nothing that is read runs as code: no pickle, no eval, no YAML objects; and nothing is unpacked from archives."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents.reading import ROOT

SOURCES = sorted(
    path
    for folder in ("training", "modeling_llm2clip", "examples", "hub_configs")
    for path in (ROOT / folder).rglob("*.py")
)
# Modules that rebuild objects from bytes, and what may be taken from one: the error that torch.load raises.
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib", "marshal", "jsonpickle"}
ERRORS = {"UnpicklingError", "PicklingError", "PickleError"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# With them, files get out of an archive.
UNPACKING = {"extract", "extractall", "unpack_archive"}
REMOTE = "trusts remote code"
LOADERS = {"load", "load_all", "full_load", "unsafe_load", "full_load_all", "unsafe_load_all", "safe_load_all"}
# The one place that reads YAML of others.
SAFE_LOADERS = {"yaml.SafeLoader", "_Loader"}
YAML_READER = ROOT / "training" / "llm2clip" / "utils" / "yaml_text.py"


def faults(source: str, reads_yaml: bool = False) -> Iterator[str]:
    """Yield what a file does that could run data as code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if module.partition(".")[0] in PICKLES and not set(names) <= ERRORS:
                yield f"imports {', '.join(names)} from {module}"
            if module == "yaml":
                yield "imports from yaml, which hides the loader"
            yield from (f"imports {name}" for name in names if not module and name in PICKLES - {"pickle"})
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if node.value.id == "pickle" and node.attr not in ERRORS:
                yield f"uses {name}"
            if node.value.id == "yaml" and node.attr in {*LOADERS, "safe_load"} - ({"load"} if reads_yaml else set()):
                yield f"uses {name}"
        elif isinstance(node, ast.ClassDef) and reads_yaml and ast.unparse(node.bases[0]) not in SAFE_LOADERS:
            yield f"{node.name} is no SafeLoader"
        if isinstance(node, ast.Call):
            yield from _call(node)


def _call(node: ast.Call) -> Iterator[str]:
    options = {keyword.arg: keyword.value for keyword in node.keywords}

    def says(option: str, value: bool) -> bool:
        given = options.get(option)
        return isinstance(given, ast.Constant) and given.value is value

    called = ast.unparse(node.func)
    loader = options.get("Loader", ast.Constant(None))
    loaders = (loader.body, loader.orelse) if isinstance(loader, ast.IfExp) else (loader,)
    if called == "yaml.load" and not {ast.unparse(one) for one in loaders} <= {"_Loader", "_UniqueLoader"}:
        yield "calls yaml.load with another loader than our safe ones"
    if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
        yield f"calls {called}"
    if called == "torch.load" and not says("weights_only", True):
        yield "calls torch.load without weights_only=True"
    if "allow_pickle" in options and not says("allow_pickle", False):
        yield "allows pickles in numpy files"
    if isinstance(node.func, ast.Attribute) and node.func.attr in UNPACKING:
        yield f"calls {called}"
    if "trust_remote_code" in options and says("trust_remote_code", True):
        yield REMOTE


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_runs_no_data(path: Path) -> None:
    found = set(faults(path.read_text(encoding="utf-8"), path == YAML_READER))
    # The examples show what users of a model write.
    assert not found - ({REMOTE} if path.parent == ROOT / "examples" else set())


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle\npickle.loads(b'')", "from pickle import loads", "import joblib", "from dill import load"),
        *("import torch\ntorch.load(path)", "torch.load(path, weights_only=False)", "torch.load(p, weights_only=x)"),
        *("numpy.load(path, allow_pickle=True)", "eval('1')", "exec(text)", "yaml.load(text)", "yaml.safe_load(text)"),
        *("from yaml import load", "archive.extractall(folder)", "tar.extract(member)", "__import__(name)"),
        *("AutoModel.from_pretrained(name, trust_remote_code=True)", "yaml.unsafe_load(text)"),
    ],
)
def test_what_would_run_data_is_found(source: str) -> None:
    assert list(faults(source))


def test_what_is_safe_passes() -> None:
    safe = "import pickle\ntry:\n    torch.load(path, weights_only=True)\nexcept pickle.UnpicklingError:\n    pass\n"
    assert not list(faults(safe + "numpy.load(path, allow_pickle=False)\nre.compile('x')\nyaml.safe_dump(fields)\n"))
