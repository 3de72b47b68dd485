"""The list of all benchmarks: what each needs, and whether it is there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llm2clip.evaluation.benchmarks.base import GROUPS, Benchmark
from llm2clip.evaluation.protocols.linear_probe import PROBES


def list_benchmarks(benchmarks: Iterable[Benchmark], data: Path | None) -> str:
    """Describe benchmarks in a block of lines each, under the heading of the group that names their kind.

    Args:
        data: Folder below which their files are looked for; None to look for nothing.
    """
    blocks: dict[str, list[str]] = {}
    for benchmark in benchmarks:
        kinds = [group for group in GROUPS if group in benchmark.groups]
        blocks.setdefault(kinds[0] if kinds else "other", []).append(describe_benchmark(benchmark, data))
    order = sorted(blocks, key=lambda kind: GROUPS.index(kind) if kind in GROUPS else len(GROUPS))
    return "\n\n".join("\n\n".join([kind.upper(), *blocks[kind]]) for kind in order)


def describe_benchmark(benchmark: Benchmark, data: Path | None) -> str:
    """Describe a benchmark in lines: name, groups, counts, files, source, license, and where it was found."""
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in benchmark.counts.items())
    lines = {
        "groups": ", ".join(benchmark.groups),
        "counts": counts or "not published",
        "files": f"{benchmark.folder}/: {benchmark.files}",
        "source": benchmark.source,
        "license": benchmark.license,
        "note": benchmark.note,
        "probes": " ".join(f"{benchmark.name}-probe-{name}" for name in PROBES) if benchmark.read_train else "",
    }
    if data is not None:
        folder = benchmark.find(data)
        lines["found"] = f"no, not below {data}" if folder is None else f"in {folder}"
    title = f"{benchmark.name}  {benchmark.title}"
    return "\n".join([title, *(f"    {name + ':':<9}{text}" for name, text in lines.items() if text)])
