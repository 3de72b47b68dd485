"""Results side by side: a row for each model, and a column for what may be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm2clip.evaluation.published import PublishedRow
from llm2clip.evaluation.results import Result
from llm2clip.evaluation.text_formats import RAW
from llm2clip.utils.settings import nearest

# Scores that are compared together, in the order in which papers print them.
TOGETHER = (("image_to_text_recall@1", "text_to_image_recall@1"), ("text_score", "image_score", "group_score"))
# What a title says even if no other column of the same set differs in it: each of these has no usual value.
NAMED_OPTIONS = ("templates",)
CHECKSUM = re.compile("[0-9a-f]{16,}")


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
class Comparison:
    """Models x columns."""

    columns: list[Column]
    rows: list[Row]

    def baseline(self, name: str) -> Row:
        """Find the row of a label.

        Raises:
            ValueError: No row has it, or several published ones have.
        """
        found = [row for row in self.rows if row.label == name]
        if not found:
            raise ValueError(f"no model is called {name!r}{nearest(name, [row.label for row in self.rows])}")
        if len(found) > 1:
            sources = "; ".join(row.source or "a result" for row in found)
            raise ValueError(f"several rows are called {name!r} ({sources}), so that it is no baseline.")
        return found[0]

    def differences(self, baseline: Row) -> list[Row]:
        """Subtract the scores of a row from those of the others, in the columns that both have."""
        rows = []
        for row in self.rows:
            cells = {
                number: {name: value - baseline.cells[number][name] for name, value in scores.items()}
                for number, scores in row.cells.items()
                if number in baseline.cells
            }
            if row is not baseline and cells:
                rows.append(Row(row.label, cells, source=row.source, unstated=row.unstated))
        return rows


def compared_scores(scores: Iterable[str]) -> tuple[str, ...]:
    """Choose the scores of a result that tables compare: recall@1 in both directions, or else the first."""
    names = list(scores)
    return next((group for group in TOGETHER if all(name in names for name in group)), (names[0],))


def compare(results: Sequence[tuple[Path, Result]]) -> Comparison:
    """Arrange results, with the files that they are from. Those that differ in protocol or data share no column.

    Raises:
        ValueError: Two results are of the same model, set, protocol and data, but differ.
    """
    columns, rows = _numbered(map(_column_key, _results(results))), _numbered(map(_row_key, _results(results)))
    firsts: dict[int, Result] = {}
    cells: dict[tuple[int, int], tuple[Path, Result]] = {}
    for path, result in results:
        place = rows[_row_key(result)], columns[_column_key(result)]
        firsts.setdefault(place[1], result)
        if place in cells:
            _require_equal(cells[place], (path, result))
        cells.setdefault(place, (path, result))
    models = {rows[_row_key(result)]: result.model for result in _results(results)}
    titles = told_apart([(first.title, _column_facts(first)) for first in firsts.values()])
    comparison = Comparison(
        [
            Column(_with_note(title, first), compared_scores(first.scores), first)
            for title, first in zip(titles, firsts.values(), strict=True)
        ],
        [Row(label) for label in told_apart([(model["given"], model) for model in models.values()])],
    )
    for (row, column), (_, result) in cells.items():
        names = comparison.columns[column].scores
        comparison.rows[row].cells[column] = {name: result.scores[name] for name in names}
        comparison.rows[row].results[column] = result
    return comparison


def add_published(comparison: Comparison, published: Iterable[PublishedRow]) -> int:
    """Add the published rows that fit a column; none fits a column of data that is not the published set.

    Returns:
        How many rows were added.
    """
    rows: dict[tuple[str, str], Row] = {}
    for line in published:
        for number, column in enumerate(comparison.columns):
            first = column.first
            has_scores = all(name in line.scores for name in column.scores)
            if first.differences or not has_scores or not line.fits(first.benchmark, first.protocol):
                continue
            row = rows.setdefault((line.model, line.source), Row(line.model, source=line.source))
            row.cells[number] = {name: line.scores[name] for name in column.scores}
            row.unstated += filter(None, [line.unstated])
    sources = _numbered(row.source for row in rows.values())
    comparison.rows += sorted(rows.values(), key=lambda row: sources[row.source])
    return len(rows)


def told_apart(entries: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """Make labels different: those that are equal get the facts in which they differ, such as `CLIP (dtype float16)`.

    Args:
        entries: Label and facts of each entry.
    """
    labels = []
    for label, facts in entries:
        others = [other for name, other in entries if name == label]
        names = [name for name in facts if any(other.get(name) != facts[name] for other in others)]
        words = ", ".join(f"{name.replace('_', ' ')} {_shortened(facts[name])}" for name in names)
        labels.append(f"{label} ({words})" if words else label)
    return labels


def _results(results: Sequence[tuple[Path, Result]]) -> list[Result]:
    return [result for _, result in results]


def _numbered(keys: Iterable[str]) -> dict[str, int]:
    """Number keys in order of first appearance."""
    return {key: number for number, key in enumerate(dict.fromkeys(keys))}


def _column_key(result: Result) -> str:
    parts = (result.benchmark, result.protocol, result.differences, result.data.get("checksum"))
    return json.dumps([*parts, compared_scores(result.scores)], sort_keys=True)


def _row_key(result: Result) -> str:
    return json.dumps(result.model, sort_keys=True)


def _column_facts(result: Result) -> dict[str, str]:
    """What may differ between two columns, as words."""
    options = {name: str(value) for name, value in result.protocol.items()}
    return {"set": result.benchmark, **options, "data": str(result.data.get("checksum", ""))}


def _shortened(value: str) -> str:
    """Shorten a commit or checksum."""
    return value[:8] if CHECKSUM.fullmatch(value) else value


def notes_on(result: Result) -> list[str]:
    """What is unusual about a result, or has no usual value: its templates, its text format, other data."""
    notes = [str(result.protocol[name]) for name in NAMED_OPTIONS if name in result.protocol]
    text_format = result.protocol.get("text_format", RAW)
    if text_format != RAW:
        notes.append(f"text format {text_format}")
    return notes + ([f"not the published set: {', '.join(result.differences)}"] if result.differences else [])


def _with_note(title: str, first: Result) -> str:
    """Add to a title what is unusual about a column, unless it is there."""
    notes = [note for note in notes_on(first) if note not in title]
    return f"{title} ({', '.join(notes)})" if notes else title


def _require_equal(known: tuple[Path, Result], other: tuple[Path, Result]) -> None:
    """Raise ValueError if two results of the same measurement have other scores."""
    (path, first), (second_path, second) = known, other
    differing: dict[str, Any] = {
        name: (value, second.scores.get(name))
        for name, value in first.scores.items()
        if value != second.scores.get(name)
    }
    if differing:
        name, (value, other_value) = next(iter(differing.items()))
        raise ValueError(
            f"{path} and {second_path} are of the same model, set and protocol ({first.model['given']}, "
            f"{first.title}), but differ: {name} is {value} and {other_value}. Leave one of them out."
        )
