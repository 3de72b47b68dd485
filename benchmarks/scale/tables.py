"""The measured tables of docs/scaling.md and their plot, from scale.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.results import Record

RESULTS = Path(__file__).parent.with_suffix(".jsonl")
PLOT = RESULTS.with_suffix(".png")
ENGINE_NAMES = {"processes": "torchrun", "ray": "Ray Data"}


def newest(lines: Iterable[str]) -> list[Record]:
    """Return the newest record of each measurement, in the order of their sizes."""
    found: dict[tuple[Any, ...], Record] = {}
    for line in lines:
        if line.strip():
            entry = json.loads(line)
            found[_what(entry)] = entry
    return [found[key] for key in sorted(found, key=str)]


def _what(entry: Record) -> tuple[Any, ...]:
    names = ("step", "engine", "processes", "workers", "threads", "captions", "kills")
    return tuple(f"{entry[name]:>12}" if isinstance(entry.get(name), int) else entry.get(name) for name in names)


def tables(entries: list[Record]) -> str:
    """Return the tables in Markdown: of embedding, of reading for stage 2, and of aligning in closed form."""
    lines: list[str] = []
    embedded = [entry for entry in entries if entry["step"] == "embed"]
    if embedded:
        lines += [
            f"| `embed`, width 512 ({_place(embedded)}) | processes | killed | rows/s | CPU per row | "
            "whole run | largest process | on disk | `verify` |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {entry['captions']:,} captions, {ENGINE_NAMES[entry['engine']]} | {entry['processes']} | "
            f"{entry['kills'] or 'never'} | {entry['rows_per_second']:,.0f} | "
            f"{entry['cpu_microseconds_per_row']:,.0f} µs | {_time(entry['seconds'])} | "
            f"{entry['peak_bytes'] / 1e9:.2f} GB | {entry['bytes'] / 1e9:.2f} GB | {_time(entry['verify_seconds'])} |"
            for entry in embedded
        ]
    read = [entry for entry in entries if entry["step"] == "read"]
    if read:
        lines += [
            *([""] if lines else []),
            f"| stage 2 reads tars and sidecars ({_place(read)}) | processes | workers each | rows/s | "
            "largest process | first batch | first batch when resumed in the middle | lanes |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {entry['captions']:,} captions | {entry['processes']} | {entry['workers']} | "
            f"{entry['rows_per_second']:,.0f} | {entry['peak_bytes'] / 1e9:.2f} GB | "
            f"{_time(entry['first_seconds'])} | {_time(entry['resume_seconds'])} | {entry['lanes']} |"
            for entry in read
        ]
    aligned = [entry for entry in entries if entry["step"] == "align"]
    if aligned:
        lines += [
            *([""] if lines else []),
            f"| `closed_form_alignment` of two Stores, widths 512 and 768 ({_place(aligned)}) | threads | pairs/s | "
            "CPU per pair | whole run | process | on disk |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {entry['captions']:,} pairs | {entry['threads']} | {entry['rows_per_second']:,.0f} | "
            f"{entry['cpu_seconds'] / entry['captions'] * 1e6:,.0f} µs | {_time(entry['seconds'])} | "
            f"{entry['peak_bytes'] / 1e9:.2f} GB | {entry['bytes'] / 1e9:.2f} GB |"
            for entry in aligned
        ]
    return "\n".join(lines) + "\n"


def _place(entries: list[Record]) -> str:
    machines = sorted({entry["machine"] for entry in entries})
    dates = sorted({entry["date"] for entry in entries})
    return f"{'; '.join(machines)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'es' * (number > 1)}"


def draw(entries: list[Record], path: Path = PLOT) -> None:
    """Plot CPU time per row, of embedding, and peak memory against the number of captions; nothing of aligning."""
    from matplotlib.figure import Figure

    from benchmarks.curves.plots import STYLES

    entries = [entry for entry in entries if entry["step"] != "align"]
    lines: dict[str, list[Record]] = {}
    for entry in entries:
        if entry["step"] == "embed":
            name = f"embed: {ENGINE_NAMES[entry['engine']]}, {_count(entry['processes'], 'process')}"
        else:
            workers = f" with {entry['workers']} workers each" if entry["workers"] else ""
            name = f"stage 2 reads: {_count(entry['processes'], 'process')}{workers}"
        lines.setdefault(name, []).append(entry)
    lines = {name: sorted(found, key=lambda entry: entry["captions"]) for name, found in lines.items()}
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    panels = (
        ("CPU time of embedding per row (µs)", "cpu_microseconds_per_row", 1.0),
        ("Peak memory of the largest process (GB)", "peak_bytes", 1e9),
    )
    for number, (title, name, unit) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 2, number)
        for place, (label, found) in enumerate(lines.items()):
            colour, marker = STYLES[place % len(STYLES)]
            measured = [entry for entry in found if name in entry]
            values = [entry[name] / unit for entry in measured]
            axes.plot([entry["captions"] for entry in measured], values, color=colour, marker=marker, label=label)
        axes.set_xscale("log")
        axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
        axes.set_xlabel("captions")
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(_place(entries), fontsize=8, color="#555555", x=0.99, ha="right")
    figure.savefig(path)
