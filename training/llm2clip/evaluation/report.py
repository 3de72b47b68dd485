"""The `llm2clip report` command: result files as a table of models x sets, beside published numbers."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.benchmarks.base import GROUPS
from llm2clip.evaluation.comparison import Comparison, Row, add_published, compare
from llm2clip.evaluation.published import published_rows
from llm2clip.evaluation.report_page import as_markdown, difference_table, score_table, sources_of
from llm2clip.evaluation.results import Result, read_result
from llm2clip.utils.files import require_writable, write_text
from llm2clip.utils.settings import setting
from llm2clip.utils.tables import print_table

logger = logging.getLogger(__name__)


@dataclass
class ReportConfig:
    """Settings of a report."""

    results: list[str] = field(
        default_factory=list, metadata={"help": "Result files of `llm2clip evaluate --benchmark`, or folders of them."}
    )
    baseline: str | None = setting(None, "Model, as the table names it, from which differences are shown.")
    paper: bool = setting(False, "Show published scores of the same sets and protocols below the results.")
    output: str | None = setting(
        None, "Markdown file for all scores with their intervals; its plots are written beside it."
    )

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("there is no result to report: llm2clip report results/*.json")
        if self.output is not None and Path(self.output).suffix.lower() != ".md":
            raise ValueError(f"output is {self.output}, but the report is Markdown: its name ends in .md.")


def run(config: ReportConfig) -> dict[str, Any]:
    """Print a report, and write it.

    Returns:
        `written`, the Markdown file, if one is asked for.

    Raises:
        FileNotFoundError: A file or folder does not exist.
        ValueError: A file is no result, two results contradict each other, or the baseline is not among the models.
    """
    comparison = compare(sorted(read_results(config.results), key=lambda one: _order(one[1])))
    if config.paper and not add_published(comparison, published_rows()):
        logger.warning("no published scores are of these sets and protocols.")
    baseline = None if config.baseline is None else comparison.baseline(config.baseline)
    if config.output is not None:
        require_writable(Path(config.output).parent)
    print_report(comparison, baseline)
    if config.output is None:
        return {}
    # Matplotlib starts slowly.
    from llm2clip.evaluation.report_plots import write_plots

    path = Path(config.output)
    plots = write_plots(path, comparison)
    write_text(path, as_markdown(comparison, baseline, [os.path.relpath(plot, path.parent) for plot in plots]))
    return {"written": path}


def read_results(names: Sequence[str]) -> list[tuple[Path, Result]]:
    """Read result files, those of patterns, and all in folders.

    Raises:
        FileNotFoundError: A file or folder does not exist, or a folder has none.
        ValueError: A file is no result.
    """
    paths: list[Path] = []
    for name in names:
        pattern = str(Path(glob.escape(name), "*.json")) if Path(name).is_dir() else name
        # A shell that does not expand patterns hands them on.
        found = [Path(name)] if Path(name).is_file() else sorted(map(Path, glob.glob(pattern)))
        if not found:
            raise FileNotFoundError(f"there is no result file {pattern}.")
        paths += found
    # A file that is named twice is one result.
    return [(path, read_result(path)) for path in dict.fromkeys(paths)]


def print_report(comparison: Comparison, baseline: Row | None) -> None:
    """Print the scores that are compared, and the differences from a baseline."""
    # Names of models are not markup.
    console = Console(markup=False, emoji=False, highlight=False)
    tables = [("Scores, %", *score_table(comparison))]
    if baseline is not None:
        title = f"Difference from {baseline.label}, percentage points"
        tables.append((title, *difference_table(comparison, baseline)))
    for title, columns, rows in tables:
        for part in _parts(console.width, columns, rows):
            lines = [[row[number] for number in part] for row in rows]
            print_table(
                console, title, [columns[number] for number in part], [line for line in lines if any(line[1:])]
            )
    for line in sources_of(comparison):
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


def _order(result: Result) -> tuple[int, str]:
    """Order results by the groups of benchmarks; those of strangers come last."""
    benchmark = all_benchmarks().get(result.benchmark)
    groups = () if benchmark is None else benchmark.groups
    return (GROUPS.index(groups[0]) if groups else len(GROUPS), result.benchmark)
