"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    text_columns: Sequence[int] = (0,),
) -> None:
    """Print a table; the columns at the positions `text_columns` are aligned left, those of numbers right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number in text_columns else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
