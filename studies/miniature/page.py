"""Write the report, README.md, from the results: tables beside the paper's, with their spread and a plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from llm2clip.evaluation.figures import panels, write_figure
from studies.miniature.material import DESCRIPTIONS, HERE, NEGATIVES
from studies.miniature.runs import CAPTIONS, TABLES, read_table, result_path, runs_of, tests_of

RESULTS, PLOTS = HERE / "results", HERE / "plots"
BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"
WAYS = ("text_to_image", "image_to_text")
CHOSEN_BY = [f"validation/{way}_recall@{rank}" for way in WAYS for rank in (1, 10)]
NAMES = {"validation": "validation", "test": "in domain", "transfer": "transfer"}


def collect(folder: Path, tables: Iterable[str]) -> None:
    """Write the scores of some tables, from the results in a folder, into one CSV a table beside this file."""
    RESULTS.mkdir(exist_ok=True)
    for table in tables:
        finished = [(run, path) for run in runs_of(table) if (path := result_path(folder, run)).is_file()]
        if finished:
            rows = [
                {"arm": run.arm, "seed": run.seed, **json.loads(path.read_text(encoding="utf-8"))}
                for run, path in finished
            ]
            write_results(table, rows)


def write_results(table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table's scores, a line for each arm and seed: those that it shows, and those that chose the epoch."""
    shown = [key for keys in columns_of(read_table(table)).values() for key in keys]
    names = ["arm", "seed", "epoch", "cpu_seconds", *dict.fromkeys([*CHOSEN_BY, *shown])]
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    with (RESULTS / f"{table}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            values = [row.get(name) for name in names]
            writer.writerow([f"{value:.5g}" if isinstance(value, float) else value for value in values])


def read_results(table: str) -> list[dict[str, Any]]:
    """Read a table's scores; an empty list if it is not measured."""
    path = RESULTS / f"{table}.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: text if name == "arm" else float(text) for name, text in row.items() if text}
            for row in csv.DictReader(file)
        ]


def table_of(name: str) -> str:
    """Return a table in Markdown: of each arm the mean and the standard deviation over its seeds, in %.

    The number of seeds is a column if it differs, and stands in the corner if it does not.
    """
    rows, fields = read_results(name), read_table(name)
    columns = columns_of(fields)
    paper = any("paper" in arm for arm in fields["arms"].values())
    lines, counts = [], set()
    for arm, settings in fields["arms"].items():
        runs = [row for row in rows if row["arm"] == arm]
        if not runs:
            continue
        cells = [spread([100 * value(row, keys) for row in runs]) for keys in columns.values()]
        # The first run also makes what others share, and some find their model made.
        seconds = f"{median(row['cpu_seconds'] for row in runs):.0f}"
        lines.append([arm, *cells, str(len(runs)), seconds, str(settings.get("paper", ""))])
        counts.add(len(runs))
    trains, same = fields.get("kind") != CAPTIONS, len(counts) == 1
    keep = [True] * (len(columns) + 1) + [trains and not same, trains, paper]
    corner = f"{counts.pop()} seeds" if trains and same else ""
    heads = [corner, *columns, "seeds", "CPU s", "paper"]
    lines = [heads, ["---", *["---:"] * (len(columns) + 2), "---"], *lines]
    return "\n".join(
        f"| {' | '.join(cell for cell, kept in zip(line, keep, strict=True) if kept)} |" for line in lines
    )


def columns_of(fields: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the scores of each column of a table, whose mean is shown."""
    if "columns" in fields:
        given = fields["columns"].items()
        return {title: (keys,) if isinstance(keys, str) else tuple(keys) for title, keys in given}
    columns: dict[str, tuple[str, ...]] = {}
    names = {**NAMES, **fields.get("names", {})}
    for test in fields.get("shown", tests_of(fields)):
        if test in NEGATIVES:
            columns[test.replace("_", " ")] = (test,)
            continue
        split, _, language = test.partition("_")
        title = test if test in DESCRIPTIONS else language or names[split]
        ranks = (1, 10) if title in names.values() else (10,)
        columns |= {f"{title}, R@{rank}": tuple(f"{test}/{way}_recall@{rank}" for way in WAYS) for rank in ranks}
    return columns


def value(row: dict[str, Any], keys: Sequence[str]) -> float:
    return mean(row[key] for key in keys)


def spread(values: Sequence[float]) -> str:
    """Return the mean and the deviation of some values; those of a closed form are equal, and have none."""
    return f"{mean(values):.1f}" + (f"±{stdev(values):.1f}" if len(set(values)) > 1 else "")


def draw_all() -> None:
    """Draw every table that has results."""
    for path in sorted(TABLES.glob("*.yaml")):
        if read_results(path.stem) and read_table(path.stem).get("kind") != CAPTIONS:
            draw(path.stem)


def draw(name: str) -> None:
    """Draw a table as `plots/NAME.png`: for each of its plotted columns, mean and standard deviation of every arm.

    A dashed line marks the mean of the baseline: the first arm, unless the table names another one.
    """
    rows, fields = read_results(name), read_table(name)
    columns = columns_of(fields)
    titles = fields.get("plot", [title for title in columns if title.endswith("R@10")][:3] or [*columns][:3])
    arms = [arm for arm in fields["arms"] if any(row["arm"] == arm for row in rows)]
    baseline = fields.get("baseline", arms[0])
    figure, axes = panels(len(titles), 1 + 0.26 * len(arms))
    for axis, title in zip(axes, titles, strict=True):
        for position, arm in enumerate(arms):
            values = [100 * value(row, columns[title]) for row in rows if row["arm"] == arm]
            error = stdev(values) if len(values) > 1 else 0
            axis.errorbar(mean(values), position, xerr=error, fmt="o", capsize=3, color="tab:blue")
            if arm == baseline:
                axis.axvline(mean(values), linestyle="--", linewidth=1, color="tab:gray")
        axis.set(title=f"{title}, %", yticks=range(len(arms)), yticklabels=arms if axis is axes[0] else [])
        axis.invert_yaxis()
        axis.set_xlim(left=0)
    PLOTS.mkdir(exist_ok=True)
    write_figure(PLOTS / f"{name}.png", figure)


def write(page: Path = HERE / "README.md") -> None:
    """Put every table between its marks in the report."""
    text = page.read_text(encoding="utf-8")
    for name in sorted(path.stem for path in TABLES.glob("*.yaml")):
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = text.split(begin, 1)
        shown = table_of(name) if read_results(name) else f"Not measured yet: `make study TABLE={name}`."
        if (PLOTS / f"{name}.png").is_file():
            shown += f"\n\n![{read_table(name)['title']}](plots/{name}.png)"
        text = f"{before}{begin}\n{shown}\n{end}{rest.split(end, 1)[1]}"
    page.write_text(text, encoding="utf-8")
