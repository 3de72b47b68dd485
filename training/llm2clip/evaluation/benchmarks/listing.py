"""Lists of benchmarks: a line for each, or all that one needs to know before getting the files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from llm2clip.evaluation.benchmark import GROUPS, Benchmark
from llm2clip.evaluation.benchmarks import PROBES
from llm2clip.evaluation.benchmarks.hub_files import on_hub

# Counts of a set in the list; the details have the others.
COUNTS = 2
COLUMNS = ("name", "found", "groups", "counts", "license")
DETAILS = "`llm2clip evaluate --list --benchmark NAME` (or a group) shows files, source and notes."


def overview(benchmarks: Iterable[Benchmark], data: Path, width: int | None = None) -> str:
    """List benchmarks in a line each, by the group that names their kind, and say how to see more.

    Args:
        data: Folder below which their files are looked for.
        width: Characters at which a line is cut; None to cut none.
    """
    members = [benchmark for some in _by_kind(benchmarks).values() for benchmark in some]
    rows: list[Sequence[str]] = [COLUMNS]
    for benchmark in members:
        counts = [*_counts(benchmark)[:COUNTS], *(["..."] if len(benchmark.counts) > COUNTS else [])]
        is_there = "yes" if benchmark.find(data) is not None else "no" if benchmark.hub is None else "on the Hub"
        groups = ", ".join(benchmark.groups)
        rows.append((benchmark.name, is_there, groups, ", ".join(counts) or "not published", benchmark.license))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(f"{text:<{size}}" for text, size in zip(row, widths, strict=True)).rstrip() for row in rows]
    if width is not None:
        lines = [line if len(line) <= width else f"{line[: width - 3]}..." for line in lines]
    there, fetched = (sum(row[1] == found for row in rows) for found in ("yes", "on the Hub"))
    found = (
        f"{there} of {len(members)} are below {data}, {fetched} of the others are fetched from the Hub when measured."
    )
    return "\n".join([*lines, "", f"{found} {DETAILS}"])


def list_benchmarks(benchmarks: Iterable[Benchmark], data: Path) -> str:
    """Describe benchmarks in a block of lines each, under the heading of the group that names their kind.

    Args:
        data: Folder below which their files are looked for.
    """
    blocks = [
        "\n\n".join([kind.upper(), *(describe_benchmark(benchmark, data) for benchmark in members)])
        for kind, members in _by_kind(benchmarks).items()
    ]
    return "\n\n".join(blocks)


def describe_benchmark(benchmark: Benchmark, data: Path) -> str:
    """Describe a benchmark in lines: name, groups, counts, files, source, license, and where it was found."""
    lines = {
        "groups": ", ".join(benchmark.groups),
        "counts": ", ".join(_counts(benchmark)) or "not published",
        "files": f"{benchmark.folder}/: {benchmark.files}",
        "source": benchmark.source,
        "license": benchmark.license,
        "numbers": benchmark.published,
        "note": benchmark.note,
        "differs": "; ".join([*benchmark.differs, *benchmark.train_differs]),
        "probes": " ".join(f"{benchmark.name}-probe-{name}" for name in PROBES) if benchmark.read_train else "",
    }
    folder = benchmark.find(data)
    elsewhere = f"no, not below {data}" if benchmark.hub is None else f"on the Hub: {on_hub(benchmark.hub)}"
    lines["found"] = elsewhere if folder is None else f"in {folder}"
    title = f"{benchmark.name}  {benchmark.title}"
    return "\n".join([title, *(f"    {name + ':':<9}{text}" for name, text in lines.items() if text)])


def _counts(benchmark: Benchmark) -> list[str]:
    return [f"{count:,} {name.replace('_', ' ')}" for name, count in benchmark.counts.items()]


def _by_kind(benchmarks: Iterable[Benchmark]) -> dict[str, list[Benchmark]]:
    """Sort benchmarks by the first of their groups, in the order of all groups; those of none come last."""
    kinds: dict[str, list[Benchmark]] = {kind: [] for kind in (*GROUPS, "other")}
    for benchmark in benchmarks:
        kinds[next((group for group in GROUPS if group in benchmark.groups), "other")].append(benchmark)
    return {kind: members for kind, members in kinds.items() if members}
