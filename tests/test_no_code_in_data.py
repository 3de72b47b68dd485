"""Nothing that is read runs as code: no pickle, no eval, no YAML objects; and nothing is unpacked from archives."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.documents.reading import ROOT

# Modules that rebuild objects from bytes, and what may be taken from one: the error that torch.load raises.
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib", "marshal", "jsonpickle"}
ERRORS = {"UnpicklingError", "PicklingError", "PickleError"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# With them, files get out of an archive.
UNPACKING = {"extract", "extractall", "unpack_archive"}
# What keeps the files of a tar below the folder; shutil leaves out those of a zip that are not.
SAFE_FILTERS = {"None if archive.suffix == '.zip' else 'data'"}
REMOTE = "trusts remote code"
LOADERS = {"load", "load_all", "full_load", "unsafe_load", "full_load_all", "unsafe_load_all", "safe_load_all"}
# The one place that reads YAML of others, and the bases of its loaders.
YAML_READER = "training/llm2clip/command_line/yaml_text.py"
SAFE_LOADERS, OUR_LOADERS = {"yaml.SafeLoader", "_Loader"}, {"_Loader", "_UniqueLoader"}


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
        elif isinstance(node, ast.Call):
            yield from _call(node)


def _call(node: ast.Call) -> Iterator[str]:
    called, options = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}

    def says(option: str, value: bool) -> bool:
        given = options.get(option)
        return isinstance(given, ast.Constant) and given.value is value

    loader = options.get("Loader", ast.Constant(None))
    loaders = (loader.body, loader.orelse) if isinstance(loader, ast.IfExp) else (loader,)
    if called == "yaml.load" and not {ast.unparse(one) for one in loaders} <= OUR_LOADERS:
        yield "calls yaml.load with another loader than our safe ones"
    how = ast.unparse(options.get("filter", ast.Constant(None)))
    is_safe = called == "shutil.unpack_archive" and how in SAFE_FILTERS
    is_unpacking = isinstance(node.func, ast.Attribute) and node.func.attr in UNPACKING and not is_safe
    if called in BUILTINS or is_unpacking:
        yield f"calls {called}"
    if called == "torch.load" and not says("weights_only", True):
        yield "calls torch.load without weights_only=True"
    if "allow_pickle" in options and not says("allow_pickle", False):
        yield "allows pickles in numpy files"
    if says("trust_remote_code", True):
        yield REMOTE


@pytest.mark.parametrize("folder", ["training", "modeling_llm2clip", "examples", "hub_configs"])
def test_no_file_runs_data(folder: str) -> None:
    # The examples show what users of a model write.
    allowed = {REMOTE} if folder == "examples" else set()
    names = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")]
    assert names
    found = {name: {*faults((ROOT / name).read_text(encoding="utf-8"), name == YAML_READER)} for name in names}
    assert {name: whys for name, whys in found.items() if whys - allowed} == {}


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle\npickle.loads(b'')", "from dill import load", "torch.load(path, weights_only=False)"),
        *("numpy.load(path, allow_pickle=True)", "eval('1')", "yaml.load(text)", "archive.extractall(folder)"),
        "shutil.unpack_archive(archive, folder)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_would_run_data_is_found(source: str) -> None:
    assert list(faults(source))
