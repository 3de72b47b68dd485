"""Benchmarks: rows of `sets.yaml`, found by their names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

from llm2clip.command_line.logs import shortened
from llm2clip.command_line.settings import nearest
from llm2clip.encoders.custom import module_of
from llm2clip.evaluation.benchmark import GROUPS, Benchmark

ALL_FOUND = "all-found"
SETS = "sets.yaml"
# The last part of a name such as `cifar10-probe-sgd`, and of the id of the protocol.
PROBES = ("sgd",)

logger = logging.getLogger(__name__)


@cache
def all_benchmarks() -> dict[str, Benchmark]:
    """Return the benchmarks of this package by name."""
    from llm2clip.evaluation.benchmarks.rows import read_sets  # whose data classes are made of modules of this package

    text = resources.files("llm2clip.evaluation").joinpath(SETS).read_text(encoding="utf-8")
    return read_sets(text, SETS)


def choose_benchmarks(names: Iterable[str], data: Path, missing_too: bool = False) -> list[Benchmark]:
    """Choose benchmarks by name, group, `all-found`, or the path of a file of one's own.

    That is a YAML file of rows as `sets.yaml` has them, or a Python file with a list `BENCHMARKS`. A group stands for
    those of its sets whose files are below `data`: only what is named is fetched from the Hub. Linear probes have
    names such as `cifar10-probe-sgd`; no group contains them, nor does `all-found`.

    Args:
        data: The folder in which a group and `all-found` look for files.
        missing_too: A group stands for all of its sets, for lists.

    Raises:
        ValueError: A name is unknown, or nothing of a group was found.
    """
    known, chosen = all_benchmarks(), dict[str, Benchmark]()
    for name in names:
        if name in known:
            named = [known[name]]
        elif name in GROUPS or name == ALL_FOUND:
            named = _members(name) if missing_too and name != ALL_FOUND else _present(name, data)
        elif (probe := probe_by_name(name, known)) is not None:
            named = [probe]
        elif name.endswith((".py", ".yaml")):
            named = _from_file(Path(name))
        else:
            family = _family(name)
            meant = f"; you may mean {shortened(family)}." if family else nearest(name, [*known, *GROUPS])
            raise ValueError(
                f"there is no benchmark, file or folder {name!r}{meant} `llm2clip evaluate --list` shows all. "
                f"Groups: {', '.join(GROUPS)}, {ALL_FOUND}."
            )
        chosen |= {benchmark.name: benchmark for benchmark in named}
    return list(chosen.values())


def probe_by_name(name: str, benchmarks: Mapping[str, Benchmark]) -> Benchmark | None:
    """Return the linear probe of a benchmark, such as `cifar10-probe-sgd`; None if that is not what `name` is.

    Raises:
        ValueError: There is no such benchmark or probe, or the benchmark has no train images.
    """
    of, separator, recipe = name.rpartition("-probe-")
    if not separator:
        return None
    benchmark = benchmarks.get(of)
    if benchmark is None or benchmark.read_train is None or recipe not in PROBES:
        known = ", ".join(known.name for known in benchmarks.values() if known.read_train is not None)
        raise ValueError(f"there is no {name!r}: linear probes are NAME-probe-{'|'.join(PROBES)}, of {known}.")
    probe = f"linear-probe-{recipe}"
    is_mean = benchmark.protocol == "mean-of-sets"
    return replace(
        benchmark.with_train(),
        name=name,
        title=f"{benchmark.title}, {recipe} probe",
        groups=(),
        protocol=benchmark.protocol if is_mean else probe,
        options={"each": probe} if is_mean else {},
    )


def _family(name: str) -> list[str]:
    """Return the benchmarks whose names begin with a part of a name, in any spelling: `coco`, `ImageNet1k`."""
    start = _letters(name)
    return [known for known in all_benchmarks() if len(start) > 2 and _letters(known).startswith(start)]


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _members(group: str) -> list[Benchmark]:
    return [benchmark for benchmark in all_benchmarks().values() if group in (*benchmark.groups, ALL_FOUND)]


def _present(group: str, data: Path) -> list[Benchmark]:
    members = _members(group)
    present = [benchmark for benchmark in members if benchmark.find(data) is not None]
    if not present:
        raise ValueError(
            f"no files of a benchmark of {group} were found below {data}; `llm2clip evaluate --list"
            f"{'' if group == ALL_FOUND else f' --benchmark {group}'}` shows what each set needs."
        )
    without = [benchmark.name for benchmark in members if benchmark not in present]
    if group != ALL_FOUND and without:
        logger.info("%s without %s, whose files are not below %s", group, ", ".join(without), data)
    return present


def _from_file(path: Path) -> list[Benchmark]:
    from llm2clip.evaluation.benchmarks.rows import read_sets

    if not path.is_file():
        raise ValueError(f"there is no file {path} with a benchmark.")
    if path.suffix != ".py":
        return list(read_sets(path.read_text(encoding="utf-8"), str(path)).values())
    module = module_of(path)
    if not getattr(module, "BENCHMARKS", None):
        raise ValueError(f"{path} has no list BENCHMARKS.")
    return list(module.BENCHMARKS)
