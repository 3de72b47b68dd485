"""The results of a run as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from llm2clip.evaluation.results import Result
from llm2clip.utils.tables import print_table

SHORT = {"text_to_image_recall@": "T2I R@", "image_to_text_recall@": "I2T R@", "recall@": "R@"}


def print_results(console: Console, results: Sequence[Result]) -> None:
    """Print one table for each protocol: scores in percent, and the interval of the first.

    Results of different protocols or text formats never share a table.
    """
    tables: dict[str, list[Result]] = {}
    for result in results:
        tables.setdefault(f"{protocol_words(result)}|{list(result.scores)}", []).append(result)
    for rows in tables.values():
        names = list(rows[0].scores)
        columns = ["benchmark", short_name(names[0]), "95%", *map(short_name, names[1:]), "tied", "cut"]
        print_table(console, f"{rows[0].model['given']}, in %", columns, [_row(result, names) for result in rows])
        console.print(f"Protocol: {protocol_words(rows[0])}.", markup=False, soft_wrap=True)
    for result in results:
        if result.differences:
            console.print(
                f"{result.title} is not the published set: it has {', '.join(result.differences)}.", markup=False
            )


def protocol_words(result: Result) -> str:
    """Describe a protocol in words, such as `retrieval, positives rows, ties expected value, text format raw`."""
    options = {name.replace("_", " "): value for name, value in result.protocol.items() if name != "name"}
    words = [f"{name} {_words(value)}" for name, value in options.items()]
    return ", ".join([str(result.protocol.get("name", "")), *words])


def short_name(score: str) -> str:
    """Shorten the name of a score for the head of a column, such as `T2I R@1`."""
    for long, short in SHORT.items():
        if score.startswith(long):
            return short + score.removeprefix(long)
    return score.replace("_", " ")


def _row(result: Result, names: Sequence[str]) -> list[str]:
    first, *others = (f"{100 * result.scores[name]:.1f}" for name in names)
    interval = result.intervals.get(names[0])
    ends = "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
    ties = [count for name, count in result.counts.items() if name.startswith("tied_")]
    cut = result.counts.get("truncated_texts")
    return [result.title, first, ends, *others, f"{sum(ties):,}" if ties else "", "" if cut is None else f"{cut:,}"]


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
