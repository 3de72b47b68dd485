"""The command `llm2clip report`: results side by side, on the terminal and in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from llm2clip.command_line.settings import setting
from llm2clip.command_line.tables import print_table
from llm2clip.evaluation.comparison import Report, Row, compare_results
from llm2clip.files.atomic import require_writable, write_text


@dataclass
class ReportConfig:
    """Settings of a report."""

    results: list[str] = field(
        default_factory=list, metadata={"help": "Result files of `llm2clip evaluate`, or folders of them."}
    )
    baseline: str | None = setting(None, "Model, as the table names it, from which differences are shown.")
    paper: bool = setting(False, "Show published scores of the same sets and protocols below the results.")
    output: str | None = setting(
        None,
        "File: .md (all scores with their intervals; plots are written beside it), .json, or .csv, whose lines are "
        "the compared scores, 0 to 1.",
    )

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("there is no result to report: llm2clip report results/*.json")
        if self.output is not None and Path(self.output).suffix.lower() not in (".md", ".json", ".csv"):
            raise ValueError(f"output is {self.output}, but the name of a report ends in .md, .json or .csv.")


def run(config: ReportConfig) -> dict[str, Any]:
    """Print a report, and write it.

    Returns:
        `written`, the file, if one is asked for.

    Raises:
        FileNotFoundError, ValueError: See [`compare_results`]; or the baseline is not among the models.
    """
    report = compare_results(config.results, config.paper)
    baseline = None if config.baseline is None else report.baseline(config.baseline)
    if config.output is None:
        print_report(report, baseline)
        return {}
    path = Path(config.output)
    require_writable(path.parent)
    if path.suffix.lower() == ".json":
        write_text(path, report.to_json())
    elif path.suffix.lower() == ".csv":
        write_text(path, report.to_pandas().unstack().dropna().rename("value").to_csv())
    else:
        from llm2clip.evaluation.plots import write_plots  # matplotlib starts slowly

        write_text(path, report.to_markdown(baseline, [plot.name for plot in write_plots(path, report)]))
    print_report(report, baseline)
    return {"written": path}


def print_report(report: Report, baseline: Row | None) -> None:
    """Print the scores that are compared, and the differences from a baseline."""
    # Names of models are not markup.
    console = Console(markup=False, emoji=False, highlight=False)
    tables = [("Scores, %", *report.table())]
    if baseline is not None:
        tables.append((f"Difference from {baseline.label}, percentage points", *report.table(baseline)))
    for title, columns, rows in tables:
        for part in _parts(console.width, columns, rows):
            lines = [[row[number] for number in part] for row in rows]
            heads = [columns[number] for number in part]
            print_table(console, title, heads, [line for line in lines if any(line[1:])])
    for line in report.sources():
        console.print(line, soft_wrap=True)


def _parts(width: int, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[int]]:
    """Divide the columns of a table among tables of a width; each begins with the first column."""
    widths = [
        3 + max(len(line) for text in (column, *(row[number] for row in rows)) for line in text.split("\n"))
        for number, column in enumerate(columns)
    ]
    parts = [[0]]
    for number in range(1, len(columns)):
        if len(parts[-1]) > 1 and sum(widths[n] for n in parts[-1]) + widths[number] >= width:
            parts.append([0])
        parts[-1].append(number)
    return parts
