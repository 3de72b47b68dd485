"""Benchmarks made of others: with other prompts, as a linear probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm2clip.evaluation.benchmark import Benchmark, BenchmarkError
from llm2clip.evaluation.prompts import choose_templates, read_names

ZERO_SHOT = "zero-shot-classification"
# The last part of a name such as `cifar10-probe-sgd`, and of the id of the protocol.
PROBES = ("sgd", "lbfgs", "openai")


def with_prompts(
    benchmarks: Sequence[Benchmark], templates: str | None = None, classnames: str | None = None
) -> list[Benchmark]:
    """Set the templates and names of the benchmarks of zero-shot classification; others stay as they are.

    Args:
        templates: A name of `TEMPLATE_SETS`, or a file with one template a line.
        classnames: A file with one name a line, in the order of the labels.

    Raises:
        BenchmarkError: No benchmark is one of zero-shot classification, or a file is broken.
    """
    given: dict[str, Any] = {}
    if templates is not None:
        given["templates"] = tuple(choose_templates(templates))
    if classnames is not None:
        given["classnames"] = tuple(read_names(Path(classnames)))
    if given and not any(benchmark.protocol == ZERO_SHOT for benchmark in benchmarks):
        raise BenchmarkError("--templates and --classnames are for benchmarks of zero-shot classification.")
    return [
        replace(benchmark, options={**benchmark.options, **given}) if benchmark.protocol == ZERO_SHOT else benchmark
        for benchmark in benchmarks
    ]


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
    return replace(
        benchmark,
        name=name,
        title=f"{benchmark.title}, {recipe} probe",
        groups=(),
        read=benchmark.read_train,
        protocol=f"linear-probe-{recipe}",
        options={},
        needs=(*benchmark.needs, *benchmark.train_needs),
        read_train=None,
    )
