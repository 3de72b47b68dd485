"""Tables on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from llm2clip.utils.terminal import printable

RECALLS = ("recall@1", "recall@5", "recall@10")


def print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    text_columns: Sequence[int] = (0,),
) -> None:
    """Print a table; the columns at the positions `text_columns` are aligned left, those of numbers right.

    Texts may be of others; see [`printable`].
    """
    table = Table(title=printable(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(printable(column), justify="left" if number in text_columns else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    console.print(table)


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], text_columns: Sequence[int] = (0,)
) -> str:
    """Write a table in Markdown, aligned as that of [`print_table`]; cells may contain `|` and newlines."""
    marks = ["---" if number in text_columns else "---:" for number in range(len(columns))]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in (columns, marks, *rows))


def _markdown_cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def recalls_in_percent(metrics: Mapping[str, Any], prefix: str = "") -> str:
    """Format the recalls at 1, 5 and 10 in percent, such as `12.3 / 45.6 / 78.9`."""
    return " / ".join(f"{100 * metrics[prefix + recall]:.1f}" for recall in RECALLS)
