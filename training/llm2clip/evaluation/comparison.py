"""Results side by side: a row for each model, and a column for what may be compared."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip.command_line.settings import nearest
from llm2clip.command_line.tables import markdown_table, short_name
from llm2clip.evaluation.benchmark import GROUPS
from llm2clip.evaluation.benchmarks import all_benchmarks
from llm2clip.evaluation.published import PublishedRow, published_rows
from llm2clip.evaluation.results import Result, notes_on, protocol_words, read_results

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger(__name__)

# Parts of results that a page does not show: plots show lengths, and classes are too many.
LEFT_OUT = ("length", "class")
# Scores of one model on one set that may differ by the device: a query whose best two are as near flips.
SAME_SCORE = 5e-3
CHECKSUM = re.compile(r"(\d-)?[0-9a-f]{16,}")
Table = tuple[list[str], list[list[str]]]


@dataclass
class Column:
    """Results that may be compared: of one benchmark, by one protocol, on the same data.

    Attributes:
        title: Name of the benchmark, and what sets the column apart from others of that name.
        scores: Names of the scores that are compared.
        first: One of the results, for what is the same in all.
    """

    title: str
    scores: tuple[str, ...]
    first: Result

    @property
    def heading(self) -> str:
        """The title, and the scores, such as `I2T / T2I R@1`, on lines of their own for narrow columns."""
        names = [short_name(name) for name in self.scores]
        ends = {name.partition(" ")[2] for name in names}
        words = " / ".join(names)
        if len(names) > 1 and len(ends) == 1 and all(name.startswith(("I2T ", "T2I ")) for name in names):
            words = f"{' / '.join(name.partition(' ')[0] for name in names)} {ends.pop()}"
        return f"{self.title.replace(' (', chr(10) + '(', 1)}\n{words}"


@dataclass
class Row:
    """The scores of a model in some columns.

    Attributes:
        label: Name of the model, and what sets the row apart from others of that name.
        cells: Scores by number of the column.
        results: Results by number of the column; none of a published row.
        source: Of a published row: the paper.
        unstated: What it does not say, though numbers depend on it.
    """

    label: str
    cells: dict[int, dict[str, float]] = field(default_factory=dict)
    results: dict[int, Result] = field(default_factory=dict)
    source: str = ""
    unstated: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Models x columns, from [`compare_results`]."""

    columns: list[Column]
    rows: list[Row]

    def baseline(self, name: str) -> Row:
        """Find the row of a label.

        Raises:
            ValueError: No row has it, or several published ones have.
        """
        rows = [row for row in self.rows if row.label == name]
        if not rows:
            labels = list(dict.fromkeys(row.label for row in self.rows))
            raise ValueError(f"no model is called {name!r}{nearest(name, labels)} The models are {', '.join(labels)}.")
        if len(rows) > 1:
            sources = "; ".join(row.source or "a result" for row in rows)
            raise ValueError(f"several rows are called {name!r} ({sources}), so that it is no baseline.")
        return rows[0]

    def table(self, baseline: Row | None = None) -> Table:
        """Return titles and rows of the scores that are compared, in percent; or of their differences from a row."""
        numbers = {source: number for number, source in enumerate(self._sources(), 1)}
        labels = [f"{row.label} [{numbers[row.source]}]" if row.source else row.label for row in self.rows]
        frame, style = self.to_pandas().set_axis(labels), "{:.1f}"
        if baseline is not None:
            place = self.rows.index(baseline)
            differences = (frame - frame.iloc[place]).iloc[[row for row in range(len(frame)) if row != place]]
            frame, style = differences.dropna(how="all"), "{:+.1f}"
        column_of = [number for number, column in enumerate(self.columns) for _ in column.scores]
        cells = (100 * frame).map(style.format, na_action="ignore").T.groupby(column_of).agg(_joined)
        heads = ["model", *(column.heading for column in self.columns)]
        return heads, [[label, *row] for label, row in zip(frame.index, cells.T.to_numpy(), strict=True)]

    def sources(self) -> list[str]:
        """Name the sources of published rows, by the numbers in the tables, and what they do not say."""
        return [
            f"[{number}] {source}" + "".join(f"; does not state {unstated}" for unstated in parts)
            for number, (source, parts) in enumerate(self._sources().items(), 1)
        ]

    def _sources(self) -> dict[str, list[str]]:
        sources: dict[str, list[str]] = {}
        for row in self.rows:
            if row.source:
                known = sources.setdefault(row.source, [])
                known += [part for part in row.unstated if part not in known]
        return sources

    def add_published(self, published: Iterable[PublishedRow]) -> int:
        """Add the published rows that fit a column; none fits a column of data that is not the published set.

        Returns:
            How many rows were added.
        """
        rows: dict[tuple[str, str], Row] = {}
        for line in published:
            for number, column in enumerate(self.columns):
                first = column.first
                has_scores = all(name in line.scores for name in column.scores)
                if first.differences or not has_scores or not line.fits(first.benchmark, first.protocol):
                    continue
                row = rows.setdefault((line.model, line.source), Row(line.model, source=line.source))
                row.cells[number] = {name: line.scores[name] for name in column.scores}
                row.unstated += filter(None, [line.unstated])
        sources = _numbered(row.source for row in rows.values())
        self.rows += sorted(rows.values(), key=lambda row: sources[row.source])
        return len(rows)

    def to_pandas(self) -> DataFrame:
        """Return the scores that are compared, 0 to 1: an index of models, and columns of benchmark and score."""
        import pandas

        names = [(column.title, name) for column in self.columns for name in column.scores]
        values = [
            [
                row.cells.get(number, {}).get(name)
                for number, column in enumerate(self.columns)
                for name in column.scores
            ]
            for row in self.rows
        ]
        index = pandas.Index([row.label for row in self.rows], name="model")
        return pandas.DataFrame(values, index, pandas.MultiIndex.from_tuples(names, names=["benchmark", "score"]))

    def to_json(self) -> str:
        """Return the scores that are compared, 0 to 1, with the intervals and the whole protocol of each column."""
        columns = [
            {"title": column.title, "benchmark": column.first.benchmark, "protocol": column.first.protocol}
            for column in self.columns
        ]
        rows = [
            {
                "model": row.label,
                "source": row.source,
                "scores": {self.columns[number].title: cell for number, cell in row.cells.items()},
                "intervals": {self.columns[number].title: result.intervals for number, result in row.results.items()},
            }
            for row in self.rows
        ]
        return json.dumps({"columns": columns, "rows": rows}, indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self, baseline: Row | None = None, plots: Sequence[str] = ()) -> str:
        """Write a page: the table of models, the differences, plots beside the page, all scores of each column."""
        parts = ["# Results", "Scores in percent.", markdown_table(*self.table())]
        if baseline is not None:
            parts += [f"## Difference from {baseline.label}", "In percentage points."]
            parts.append(markdown_table(*self.table(baseline)))
        parts += ["\n".join(f"- {line}" for line in self.sources())] if self.sources() else []
        parts += [f"![{plot.removesuffix('.png')}]({plot.replace(' ', '%20')})" for plot in plots]
        for number, column in enumerate(self.columns):
            results = [(row.label, row.results[number]) for row in self.rows if number in row.results]
            parts += _details(column, results)
        return "\n\n".join(parts) + "\n"


def compare_results(results: Sequence[str | Path | Result], paper: bool = False) -> Report:
    """Arrange results side by side: models in the order given. Those that differ in protocol or data share no column.

    Args:
        results: Results of [`evaluate`], or their files, patterns of files and folders.
        paper: Add published scores of the same sets and protocols.

    Raises:
        FileNotFoundError: A file or folder does not exist.
        ValueError: A file is no result, or two results are of the same model, set, protocol and data, but differ.
    """
    named: list[tuple[str, Result]] = []
    for given in results:
        named += [(given.title, given)] if isinstance(given, Result) else read_results(str(given))
    rows = _numbered(_row_key(result) for _, result in named)
    entries = sorted(named, key=_order)
    columns = _numbered(_column_key(result) for _, result in entries)
    cells: dict[tuple[int, int], tuple[str, Result]] = {}
    for name, result in entries:
        cell = rows[_row_key(result)], columns[_column_key(result)]
        require_equal(cells.setdefault(cell, (name, result)), (name, result))
    firsts = {column: result for (_, column), (_, result) in reversed(cells.items())}
    models = {row: result.model for (row, _), (_, result) in cells.items()}
    titles = told_apart([(firsts[number].title, _column_facts(firsts[number])) for number in range(len(columns))])
    entries_of_rows = [(models[number]["given"], models[number]) for number in range(len(rows))]
    # Embeddings that are cut or rounded have another fingerprint, which says no more.
    labels = told_apart([(label, {**facts, "fingerprint": ""}) for label, facts in entries_of_rows])
    if len(set(labels)) < len(labels):
        labels = told_apart(entries_of_rows)
    report = Report(
        [
            Column(_with_note(title, firsts[number]), tuple(firsts[number].compared), firsts[number])
            for number, title in enumerate(titles)
        ],
        [Row(label) for label in labels],
    )
    for (row, column), (_, result) in cells.items():
        report.rows[row].cells[column] = {name: result.scores[name] for name in result.compared}
        report.rows[row].results[column] = result
    if paper and not report.add_published(published_rows()):
        logger.warning("no published scores are of these sets and protocols.")
    return report


def require_equal(known: tuple[str, Result], other: tuple[str, Result]) -> None:
    """Raise ValueError if scores of two results of the same measurement differ by more than `SAME_SCORE`."""
    (name, first), (second_name, second) = known, other
    differences = {score: abs(value - second.scores.get(score, math.nan)) for score, value in first.scores.items()}
    for score, difference in differences.items():
        if not difference <= SAME_SCORE:
            raise ValueError(
                f"{name} and {second_name} are of the same model, set and protocol ({first.model['given']}, "
                f"{first.title}), but differ by more than {SAME_SCORE}: {score} is {first.scores[score]} and "
                f"{second.scores.get(score)}. Leave one of them out."
            )
    if largest := max(differences.values(), default=0):
        logger.warning(
            "%s and %s of one model on one set differ by up to %.2g: %s; those of the first are shown.",
            name, second_name, largest, first.benchmark,
        )  # fmt: skip


def told_apart(entries: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """Make labels different: those that are equal get the facts in which they differ, such as `CLIP (dtype float16)`.

    Args:
        entries: Label and facts of each entry.
    """
    labels = []
    for label, facts in entries:
        others = [other for name, other in entries if name == label]
        names = [name for name in facts if any(other.get(name) != facts[name] for other in others)]
        # A commit or checksum is long.
        shown = {name: facts[name][:8] if CHECKSUM.fullmatch(facts[name]) else facts[name] for name in names}
        words = ", ".join(f"{name.replace('_', ' ')} {fact}" for name, fact in shown.items())
        labels.append(f"{label} ({words})" if words else label)
    return labels


def _order(entry: tuple[str, Result]) -> tuple[int, str]:
    """Order results by the groups of benchmarks; those of strangers come last."""
    benchmark = all_benchmarks().get(entry[1].benchmark)
    groups = () if benchmark is None else benchmark.groups
    return (GROUPS.index(groups[0]) if groups else len(GROUPS), entry[1].benchmark)


def _numbered(keys: Iterable[str]) -> dict[str, int]:
    """Number keys in order of first appearance."""
    return {key: number for number, key in enumerate(dict.fromkeys(keys))}


def _column_key(result: Result) -> str:
    parts = (result.benchmark, result.protocol, result.differences, result.data.get("checksum"), result.compared)
    return json.dumps(parts, sort_keys=True)


def _row_key(result: Result) -> str:
    return json.dumps(result.model, sort_keys=True)


def _column_facts(result: Result) -> dict[str, str]:
    """Say what may differ between two columns, as words; the name of a protocol stands for its id."""
    options = {{"name": "protocol"}.get(name, name): str(value) for name, value in result.protocol.items()}
    del options["id"]
    return {"set": result.benchmark, **options, "data": str(result.data.get("checksum", ""))}


def _with_note(title: str, first: Result) -> str:
    """Add to a title what is unusual about a column, unless it is there."""
    notes = [note for note in notes_on(first) if note not in title]
    return f"{title} ({', '.join(notes)})" if notes else title


def _joined(cells: Iterable[Any]) -> str:
    """Write the scores of a cell, of which a model has all or none."""
    return " / ".join(cell for cell in cells if isinstance(cell, str))


def _table(frame: DataFrame) -> Table:
    """Return the titles of columns, and the rows, in which what is not there is empty."""
    return list(frame.columns), frame.fillna("").to_numpy().tolist()


def _details(column: Column, results: Sequence[tuple[str, Result]]) -> list[str]:
    """Write all that was measured in a column: scores with their intervals, counts, and scores of parts."""
    import pandas

    rows = [
        {"model": label}
        | {short_name(name): _with_interval(result, name) for name in result.scores}
        | {short_name(name): f"{value:,.4g}" for name, value in result.ranks.items()}
        | {short_name(name): f"{count:,}" for name, count in result.counts.items()}
        for label, result in results
    ]
    table = markdown_table(*_table(pandas.DataFrame(rows)))
    parts = [f"## {column.title}", f"Protocol: {protocol_words(column.first)}.", table]
    for kind in dict.fromkeys(kind for _, result in results for kind in result.groups if kind not in LEFT_OUT):
        parts += [f"### By {kind}", markdown_table(*_groups(kind, column, results))]
    return parts


def _groups(kind: str, column: Column, results: Sequence[tuple[str, Result]]) -> Table:
    """Return the compared scores of the parts of results, a row for each part."""
    import pandas

    known = {label: result.groups[kind] for label, result in results if kind in result.groups}
    names = [
        name for name in column.scores if any(name in part for parts in known.values() for part in parts.values())
    ]
    cells = {
        label: {
            part: " / ".join(f"{100 * scores[name]:.1f}" for name in names if name in scores)
            for part, scores in parts.items()
        }
        for label, parts in known.items()
    }
    return _table(pandas.DataFrame(cells).reset_index(names=f"{kind}, {' / '.join(map(short_name, names))}"))


def _with_interval(result: Result, name: str) -> str:
    score, interval = f"{100 * result.scores[name]:.1f}", result.intervals.get(name)
    return score if interval is None else f"{score} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
