"""The results of a run as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from llm2clip.evaluation.results import Result
from llm2clip.utils.tables import in_percent, print_table, score_columns


def print_results(console: Console, results: Sequence[Result]) -> None:
    """Print one table for each protocol: scores in percent, and the interval of the first.

    Results of different protocols or text formats never share a table.
    """
    tables: dict[str, list[Result]] = {}
    for result in results:
        tables.setdefault(f"{protocol_words(result)}|{list(result.scores)}", []).append(result)
    for rows in tables.values():
        columns = score_columns(list(rows[0].scores))
        first, *others = columns
        heads = ["benchmark", first, "95%", *others]
        print_table(console, f"{rows[0].model['given']}, in %", heads, [_row(result, columns) for result in rows])
        console.print(
            f"Protocol: {protocol_words(rows[0])}. 95%: interval of the first.", markup=False, soft_wrap=True
        )
    for result in results:
        remarks = "; ".join(remarks_on(result))
        if remarks:
            console.print(f"{result.title}: {remarks}.", markup=False, soft_wrap=True)


def remarks_on(result: Result) -> list[str]:
    """What to know of the numbers of a result: ties, cut and empty texts, counts that differ from the published."""
    ties = sum(count for name, count in result.counts.items() if name.startswith("tied_"))
    cut, empty = (result.counts.get(name, 0) for name in ("truncated_texts", "empty_texts"))
    counted = [
        (ties, "tied query", "tied queries"),
        (cut, "text cut at its end", "texts cut at their end"),
        (empty, "empty text", "empty texts"),
    ]
    remarks = [f"{count:,} {one if count == 1 else several}" for count, one, several in counted if count]
    if result.differences:
        remarks.append(f"not the published set, {', '.join(result.differences)}")
    return remarks


def protocol_words(result: Result) -> str:
    """Describe a protocol in words, such as `retrieval, positives rows, ties expected value, text format raw`."""
    options = {name.replace("_", " "): value for name, value in result.protocol.items() if name != "name"}
    words = [f"{name} {_words(value)}" for name, value in options.items()]
    return ", ".join([str(result.protocol.get("name", "")), *words])


def _row(result: Result, columns: dict[str, list[str]]) -> list[str]:
    cells = in_percent(result.scores, columns)
    interval = result.intervals.get(next(iter(result.scores)))
    ends = "" if interval is None else f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"
    return [result.title, cells[0], ends, *cells[1:]]


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
