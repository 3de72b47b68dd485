"""The tables of a report, and its page in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from llm2clip.evaluation.comparison import Column, Comparison, Row
from llm2clip.evaluation.results import Result
from llm2clip.evaluation.results_table import protocol_words
from llm2clip.utils.tables import SHORT, markdown_table, short_name

Table = tuple[list[str], list[list[str]]]
MODEL = "model"
# Parts of results that a page does not show: plots show lengths, and classes are too many.
LEFT_OUT = ("length", "class")


def score_table(comparison: Comparison) -> Table:
    """Return titles and rows of the scores that are compared, in percent."""
    return _table(comparison, comparison.rows, "{:.1f}")


def difference_table(comparison: Comparison, baseline: Row) -> Table:
    """Return titles and rows of the differences from a row, in percentage points."""
    return _table(comparison, comparison.differences(baseline), "{:+.1f}")


def _table(comparison: Comparison, rows: Sequence[Row], style: str) -> Table:
    numbers = {source: number for number, source in enumerate(_sources(comparison.rows), 1)}
    lines = []
    for row in rows:
        label = f"{row.label} [{numbers[row.source]}]" if row.source else row.label
        cells = (row.cells.get(number) for number in range(len(comparison.columns)))
        lines.append([label, *(_cell(cell, style) for cell in cells)])
    # What sets a column apart stands on a line of its own, for narrow columns.
    titles = [column.title.replace(" (", "\n(", 1) for column in comparison.columns]
    headings = [f"{title}\n{_heading(column)}" for title, column in zip(titles, comparison.columns, strict=True)]
    return [MODEL, *headings], lines


def sources_of(comparison: Comparison) -> list[str]:
    """Name the sources of published rows, by the numbers in the tables, and what they do not say."""
    return [
        f"[{number}] {source}" + "".join(f"; does not state {unstated}" for unstated in unstated_parts)
        for number, (source, unstated_parts) in enumerate(_sources(comparison.rows).items(), 1)
    ]


def _sources(rows: Sequence[Row]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.source:
            known = found.setdefault(row.source, [])
            known += [part for part in row.unstated if part not in known]
    return found


def _cell(scores: Mapping[str, float] | None, style: str) -> str:
    return "" if scores is None else " / ".join(style.format(100 * value) for value in scores.values())


def _heading(column: Column) -> str:
    """Name the scores of a column, such as `I2T / T2I R@1`."""
    names = [short_name(name) for name in column.scores]
    ends = {name.partition(" ")[2] for name in names}
    if len(names) > 1 and len(ends) == 1 and all(name.startswith(tuple(SHORT)) for name in column.scores):
        return f"{' / '.join(name.partition(' ')[0] for name in names)} {ends.pop()}"
    return " / ".join(names)


def as_markdown(comparison: Comparison, baseline: Row | None, plots: Sequence[str] = ()) -> str:
    """Write a report as Markdown: the table of models, the differences, plots, and all scores of each column.

    Args:
        plots: Paths of pictures, relative to the page.
    """
    parts = ["# Results", "Scores in percent.", markdown_table(*score_table(comparison))]
    if baseline is not None:
        parts += [f"## Difference from {baseline.label}", "In percentage points."]
        parts.append(markdown_table(*difference_table(comparison, baseline)))
    parts += ["\n".join(f"- {line}" for line in sources_of(comparison))] if sources_of(comparison) else []
    parts += [f"![{plot.removesuffix('.png')}]({plot.replace(' ', '%20')})" for plot in plots]
    for number, column in enumerate(comparison.columns):
        parts += _details(
            column, [(row.label, row.results[number]) for row in comparison.rows if number in row.results]
        )
    return "\n\n".join(parts) + "\n"


def _details(column: Column, results: Sequence[tuple[str, Result]]) -> list[str]:
    """Write all that was measured in a column: scores with their intervals, counts, and scores of parts."""
    names = list(dict.fromkeys(name for _, result in results for name in result.scores))
    counts = list(dict.fromkeys(name for _, result in results for name in result.counts))
    titles = [MODEL, *map(short_name, names), *(name.replace("_", " ") for name in counts)]
    rows = [
        [label, *(_with_interval(result, name) for name in names), *_counts(result, counts)]
        for label, result in results
    ]
    parts = [f"## {column.title}", f"Protocol: {protocol_words(column.first)}.", markdown_table(titles, rows)]
    for kind in dict.fromkeys(kind for _, result in results for kind in result.groups if kind not in LEFT_OUT):
        parts += [f"### By {kind}", markdown_table(*_groups(kind, column, results))]
    return parts


def _groups(kind: str, column: Column, results: Sequence[tuple[str, Result]]) -> Table:
    """Return the compared scores of the parts of results, a row for each part."""
    known = [(label, result.groups[kind]) for label, result in results if kind in result.groups]
    parts = dict.fromkeys(part for _, groups in known for part in groups)
    names = [
        name for name in column.scores if any(name in scores for _, groups in known for scores in groups.values())
    ]
    rows = []
    for part in parts:
        found = (groups.get(part, {}) for _, groups in known)
        cells = ({name: scores[name] for name in names if name in scores} for scores in found)
        rows.append([part, *(_cell(cell, "{:.1f}") for cell in cells)])
    return [f"{kind}, {' / '.join(map(short_name, names))}", *(label for label, _ in known)], rows


def _with_interval(result: Result, name: str) -> str:
    if name not in result.scores:
        return ""
    score, interval = f"{100 * result.scores[name]:.1f}", result.intervals.get(name)
    return score if interval is None else f"{score} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _counts(result: Result, names: Iterable[str]) -> list[str]:
    return [f"{result.counts[name]:,}" if name in result.counts else "" for name in names]
