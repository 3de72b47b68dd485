"""Plots of results: models beside each other, and recall by the length of captions."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from llm2clip.evaluation.results import Result
from llm2clip.utils.figures import panels, write_figure
from llm2clip.utils.tables import short_name

if TYPE_CHECKING:
    from llm2clip.evaluation.report import Report

BY_LENGTH = "text_to_image_recall@1"
SIDES = {"text_to_image": "text to image", "image_to_text": "image to text"}
# Of more models than this, those that were measured are drawn without the published ones.
MOST_BARS = 12
# Titles of columns say what is unusual and may be long. Height of a row of panels in inches, widths in characters.
HEIGHT, TITLE_WIDTH, LABEL_WIDTH = 4.5, 50, 28


def write_plots(path: Path, report: Report) -> list[Path]:
    """Write the plots of a report beside its page.

    Args:
        path: The page, such as `table.md`; the plots are `table-models.png` and, if there are recalls by length,
            `table-lengths.png`.

    Returns:
        Their paths.
    """
    draw: dict[str, Callable[[Report], Figure | None]] = {"models": draw_models, "lengths": draw_lengths}
    written = []
    for name, drawn in ((name, function(report)) for name, function in draw.items()):
        if drawn is not None:
            written.append(path.with_name(f"{path.stem}-{name}.png"))
            write_figure(written[-1], drawn)
    return written


def draw_models(report: Report) -> Figure:
    """Draw the scores that are compared as bars: a panel for each kind of score, a group of bars for each column."""
    if len(report.rows) > MOST_BARS:
        report = replace(report, rows=[row for row in report.rows if not row.source])
    names = list(dict.fromkeys(name for column in report.columns for name in column.scores))
    figure, axes = panels(len(names), HEIGHT)
    for name, axis in zip(names, axes, strict=True):
        numbers = [number for number, column in enumerate(report.columns) if name in column.scores]
        _bars(axis, report, name, numbers)
        titles = [textwrap.fill(report.columns[number].title, LABEL_WIDTH) for number in numbers]
        axis.set_xticks(range(len(numbers)), titles, fontsize="small", rotation=30, ha="right")
        axis.set(title=short_name(name), ylabel="%", ylim=(0, 100))
    _legend(figure, axes)
    return figure


def _bars(axis: Any, report: Report, name: str, numbers: list[int]) -> None:
    width = 0.8 / len(report.rows)
    for place, row in enumerate(report.rows):
        found = [(at, number) for at, number in enumerate(numbers) if name in row.cells.get(number, {})]
        values = [row.cells[number][name] for _, number in found]
        ends = [
            row.results[number].intervals.get(name, [value, value]) if number in row.results else [value, value]
            for (_, number), value in zip(found, values, strict=True)
        ]
        # A score of several parts may lie outside the interval by rounding.
        errors = [
            [100 * max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
            [100 * max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
        ]
        positions = [at + (place - (len(report.rows) - 1) / 2) * width for at, _ in found]
        axis.bar(positions, [100 * value for value in values], width, yerr=errors, label=row.label)


def draw_lengths(report: Report) -> Figure | None:
    """Draw recall over the length of captions: a panel for each column, a line for each model; None without lengths.

    Lengths are counted by each model's own tokenizer, so that captions fall into other buckets.
    """
    chosen = [
        number
        for number in range(len(report.columns))
        if any(len(_by_length(row.results[number].groups)) > 1 for row in report.rows if number in row.results)
    ]
    if not chosen:
        return None
    figure, axes = panels(len(chosen), HEIGHT)
    for number, axis in zip(chosen, axes, strict=True):
        lines = {row.label: _by_length(row.results[number].groups) for row in report.rows if number in row.results}
        buckets = sorted({bucket for line in lines.values() for bucket in line}, key=_first_length)
        for label, line in lines.items():
            found = [bucket for bucket in buckets if bucket in line]
            positions = [buckets.index(bucket) for bucket in found]
            axis.plot(positions, [100 * line[bucket] for bucket in found], marker=".", label=label)
        axis.set_xticks(range(len(buckets)), buckets, fontsize="small", rotation=30)
        axis.set_title(textwrap.fill(report.columns[number].title, TITLE_WIDTH), fontsize="medium")
        axis.set(xlabel="tokens", ylabel=short_name(BY_LENGTH), ylim=(0, 100))
    _legend(figure, axes)
    return figure


def _by_length(groups: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    return {bucket: scores[BY_LENGTH] for bucket, scores in groups.get("length", {}).items() if BY_LENGTH in scores}


def _first_length(bucket: str) -> int:
    """The smallest length in a bucket such as `17-32` or `513-`."""
    return int(bucket.partition("-")[0])


def _legend(figure: Figure, axes: Any) -> None:
    """Name the lines or bars of all panels once, below them."""
    found = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", fontsize="small", ncols=2)


def write_length_plot(path: Path, result: Result) -> bool:
    """Draw the recalls of a result over the length of captions, if it has captions of several lengths.

    Args:
        path: PNG file.

    Returns:
        Whether there was anything to draw.
    """
    buckets = result.groups.get("length", {})
    if len(buckets) < 2:
        return False
    names = [name for name in result.scores if name in next(iter(buckets.values()))]
    sides = [side for side in SIDES if any(name.startswith(side) for name in names)]
    figure, axes = panels(len(sides))
    ticks = [f"{bucket}\n({group['texts']:,.0f})" for bucket, group in buckets.items()]
    for side, axis in zip(sides, axes, strict=True):
        for name in names:
            if name.startswith(side):
                values = [100 * group[name] for group in buckets.values()]
                axis.plot(range(len(ticks)), values, marker=".", label=name.removeprefix(f"{side}_"))
        axis.set(title=f"{result.title}: {SIDES[side]}", xlabel="tokens (captions)", ylabel="%", ylim=(0, 100))
        axis.set_xticks(range(len(ticks)), ticks, fontsize="small")
        axis.legend(fontsize="small")
    figure.suptitle(result.model["given"], fontsize="small")
    write_figure(path, figure)
    return True
