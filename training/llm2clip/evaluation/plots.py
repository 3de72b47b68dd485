"""The plots of a report: models beside each other, and recall by the length of captions."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from llm2clip.command_line.tables import short_name
from llm2clip.evaluation.comparison import Report, Row
from llm2clip.evaluation.figures import panels, write_figure

BY_LENGTH = "text_to_image_recall@1"
# With more models than this, a plot leaves out the published ones.
MOST_BARS = 12
# Titles of columns say what is unusual and may be long. Height of a row of panels in inches, widths in characters.
HEIGHT, TITLE_WIDTH, LABEL_WIDTH = 4.5, 50, 28


def write_plots(page: Path, report: Report) -> list[Path]:
    """Write plots beside a page: `table-models.png`, and `table-lengths.png` if there are recalls by length."""
    written = []
    for name, figure in (("models", draw_models(report)), ("lengths", draw_lengths(report))):
        if figure is not None:
            written.append(page.with_name(f"{page.stem}-{name}.png"))
            write_figure(written[-1], figure)
    return written


def draw_models(report: Report) -> Figure:
    """Draw the scores that are compared as bars: a panel for each kind of score, a group of bars for each column."""
    if len(report.rows) > MOST_BARS:
        report = replace(report, rows=[row for row in report.rows if not row.source])
    names = list(dict.fromkeys(name for column in report.columns for name in column.scores))
    figure, axes = panels(len(names), HEIGHT)
    width = 0.8 / len(report.rows)
    for name, axis in zip(names, axes, strict=True):
        numbers = [number for number, column in enumerate(report.columns) if name in column.scores]
        for position, row in enumerate(report.rows):
            scored = [(at, number) for at, number in enumerate(numbers) if name in row.cells.get(number, {})]
            positions = [at + (position - (len(report.rows) - 1) / 2) * width for at, _ in scored]
            values = [100 * row.cells[number][name] for _, number in scored]
            errors = [_errors(row, number, name) for _, number in scored]
            axis.bar(positions, values, width, yerr=list(zip(*errors, strict=True)) or None, label=row.label)
        titles = [textwrap.fill(report.columns[number].title, LABEL_WIDTH) for number in numbers]
        axis.set_xticks(range(len(numbers)), titles, fontsize="small", rotation=30, ha="right")
        axis.set(title=short_name(name), ylabel="%", ylim=(0, 100))
    _name_once(figure, axes)
    return figure


def _errors(row: Row, number: int, name: str) -> tuple[float, float]:
    """Return how far the interval of a score reaches below and above it; a published score has none."""
    value = row.cells[number][name]
    low, high = row.results[number].intervals.get(name, (value, value)) if number in row.results else (value, value)
    # A score of several parts may lie outside the interval by rounding.
    return 100 * max(0.0, value - low), 100 * max(0.0, high - value)


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
            drawn = [bucket for bucket in buckets if bucket in line]
            positions = [buckets.index(bucket) for bucket in drawn]
            axis.plot(positions, [100 * line[bucket] for bucket in drawn], marker=".", label=label)
        axis.set_xticks(range(len(buckets)), buckets, fontsize="small", rotation=30)
        axis.set_title(textwrap.fill(report.columns[number].title, TITLE_WIDTH), fontsize="medium")
        axis.set(xlabel="tokens", ylabel=short_name(BY_LENGTH), ylim=(0, 100))
    _name_once(figure, axes)
    return figure


def _name_once(figure: Figure, axes: Any) -> None:
    """Name the lines or bars of all panels once, below them."""
    named = {label: drawn for axis in axes for drawn, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", fontsize="small", ncols=2)


def _by_length(groups: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    return {bucket: scores[BY_LENGTH] for bucket, scores in groups.get("length", {}).items() if BY_LENGTH in scores}


def _first_length(bucket: str) -> int:
    """Return the smallest length in a bucket such as `17-32` or `513-`."""
    return int(bucket.partition("-")[0])
