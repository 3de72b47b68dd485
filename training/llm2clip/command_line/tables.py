"""Tables on the terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from llm2clip.command_line.logs import printable

RECALLS = ("recall@1", "recall@5", "recall@10")
SHORT = {
    "text_to_image_": "T2I ", "image_to_text_": "I2T ", "recall@": "R@", "map@r": "mAP@R", "miou": "mIoU",
    "r_precision": "R-precision",
}  # fmt: skip
# Before the recalls of a model before its training: `before_training_validation_text_to_image_recall@1`.
BEFORE = "before_training_"
# A recall, possibly of a set: `text_to_image_recall@1`, `eval_validation_text_to_image_recall@1`.
RECALL = re.compile(r"(?:(.*?)_)??((?:text_to_image_|image_to_text_)?recall@\d+)")


def print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    text_columns: Sequence[int] = (0,),
) -> None:
    """Print a table; the columns at the positions `text_columns` are aligned left, those of numbers right.

    Texts may be of others; see [`printable`]. Brackets in them are no markup.
    """
    table = Table(title=Text(printable(title)), title_justify="left")
    for number, column in enumerate(columns):
        justify: JustifyMethod = "left" if number in text_columns else "right"
        table.add_column(Text(printable(column)), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def short_name(score: str) -> str:
    """Shorten the name of a score for the head of a column, such as `T2I R@1`."""
    for long, short in SHORT.items():
        score = score.replace(long, short)
    return score.replace("_", " ")


def score_columns(names: Sequence[str]) -> dict[str, list[str]]:
    """Put recalls at several k into one column.

    Returns:
        The scores of each column by its head, such as `T2I R@1 / 5 / 10`.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.partition("@")[0], []).append(name)
    return {
        short_name(group[0]) + "".join(f" / {name.partition('@')[2]}" for name in group[1:]): group
        for group in kinds.values()
    }


def in_percent(scores: Mapping[str, float], columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Format the cells of the columns of [`score_columns`], such as `12.3 / 45.6 / 78.9`."""
    return [" / ".join(f"{100 * scores[name]:.1f}" for name in names) for names in columns.values()]


def split_recalls(values: Mapping[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Separate the recalls among the values of a run from the rest.

    Returns:
        The recalls by the name of their set (without `eval_`; empty if there is one set) and their name in it, and the
        other values.
    """
    recalls: dict[str, dict[str, float]] = {}
    others = {}
    for name, value in values.items():
        if match := RECALL.fullmatch(name):
            recalls.setdefault((match[1] or "").replace("eval_", ""), {})[match[2]] = value
        else:
            others[name] = value
    return recalls, others


def print_values(values: Mapping[str, Any]) -> None:
    """Print what a command returns: a line for each value, and a table of recalls in percent with a row for each set.

    Texts may be of others; see [`printable`].
    """
    console = Console()
    recalls, others = split_recalls(values)
    for name, value in others.items():
        text = f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}"
        console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
    tables: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for name, scores in recalls.items():
        tables.setdefault(tuple(scores), {})[name] = scores
    for names, rows in tables.items():
        columns = score_columns(names)
        # Each set before training stands above the same set after it, which come in two groups.
        places = [name.replace(BEFORE, "") for name in rows]
        rows = dict(sorted(rows.items(), key=lambda row: places.index(row[0].replace(BEFORE, ""))))
        shown = [f"{name.replace(BEFORE, '')}, before training" if BEFORE in name else name for name in rows]
        titles, heads = ([[name] for name in shown], ["set"]) if any(rows) else ([[]], [])
        cells = [title + in_percent(scores, columns) for title, scores in zip(titles, rows.values(), strict=True)]
        print_table(console, "Recall, in %", [*heads, *columns], cells, range(len(heads)))


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], text_columns: Sequence[int] = (0,)
) -> str:
    """Write a table in Markdown, aligned as that of [`print_table`]; cells may contain `|` and newlines."""
    marks = ["---" if number in text_columns else "---:" for number in range(len(columns))]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in (columns, marks, *rows))


def _markdown_cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
