"""Benchmarks: one small file for each set, found by its name."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from llm2clip.evaluation.benchmarks.base import GROUPS, Benchmark
from llm2clip.evaluation.protocols.linear_probe import probe_by_name

ALL_FOUND = "all-found"


@cache
def all_benchmarks() -> dict[str, Benchmark]:
    """Return the benchmarks of this package by name, from the list `BENCHMARKS` of each module."""
    found: dict[str, Benchmark] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        for benchmark in getattr(importlib.import_module(f"{__name__}.{module.name}"), "BENCHMARKS", []):
            if benchmark.name in found:
                raise ValueError(f"two benchmarks have the name {benchmark.name!r}.")
            found[benchmark.name] = benchmark
    return found


def choose_benchmarks(names: Iterable[str], data: Path) -> list[Benchmark]:
    """Choose benchmarks by name, group, `all-found` or the path of a Python file with a list `BENCHMARKS`.

    Linear probes have names such as `cifar10-probe-sgd`; no group contains them, nor does `all-found`.

    Args:
        data: The folder in which `all-found` looks for their files.

    Raises:
        ValueError: A name is unknown, or nothing was found.
    """
    known, chosen = all_benchmarks(), dict[str, Benchmark]()
    for name in names:
        if name in known:
            some = [known[name]]
        elif name in GROUPS:
            some = [benchmark for benchmark in known.values() if name in benchmark.groups]
        elif name == ALL_FOUND:
            some = [benchmark for benchmark in known.values() if benchmark.find(data) is not None]
        elif (probe := probe_by_name(name, known)) is not None:
            some = [probe]
        elif name.endswith(".py"):
            some = list(_from_file(Path(name)).BENCHMARKS)
        else:
            raise ValueError(
                f"there is no benchmark {name!r}; `llm2clip evaluate --list` shows all. Groups: "
                f"{', '.join(GROUPS)}, {ALL_FOUND}."
            )
        chosen |= {benchmark.name: benchmark for benchmark in some}
    if not chosen:
        raise ValueError(f"no files of a benchmark were found below {data}.")
    return list(chosen.values())


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"there is no file {path} with a benchmark.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not getattr(module, "BENCHMARKS", None):
        raise ValueError(f"{path} has no list BENCHMARKS.")
    return module
