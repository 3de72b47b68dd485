"""The plot of a report: recall by the length of captions."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from llm2clip.utils.figures import panels, write_figure
from llm2clip.utils.tables import short_name

if TYPE_CHECKING:
    from llm2clip.evaluation.report import Report

BY_LENGTH = "text_to_image_recall@1"
# Titles of columns say what is unusual and may be long. Height of a row of panels in inches, width in characters.
HEIGHT, TITLE_WIDTH = 4.5, 50


def write_lengths(page: Path, report: Report) -> Path | None:
    """Write the plot beside a page, `table-lengths.png` beside `table.md`; None if there are no recalls by length."""
    figure = draw_lengths(report)
    if figure is None:
        return None
    path = page.with_name(f"{page.stem}-lengths.png")
    write_figure(path, figure)
    return path


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
    # The lines of all panels are named once, below them.
    named = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", fontsize="small", ncols=2)
    return figure


def _by_length(groups: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    return {bucket: scores[BY_LENGTH] for bucket, scores in groups.get("length", {}).items() if BY_LENGTH in scores}


def _first_length(bucket: str) -> int:
    """The smallest length in a bucket such as `17-32` or `513-`."""
    return int(bucket.partition("-")[0])
