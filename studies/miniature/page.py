"""Write the report, README.md, from the results: tables beside the paper's, with their spread and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG

from llm2clip.evaluation.figures import panels
from studies.miniature.material import DESCRIPTIONS, HERE, NEGATIVES
from studies.miniature.runs import CAPTIONS, TABLES, read_table, result_path, runs_of, tests_of

RESULTS, PLOTS = HERE / "results", HERE / "plots"
BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"
WAYS = ("text_to_image", "image_to_text")
NAMES = {"validation": "validation", "test": "in domain", "transfer": "transfer"}


def collect(folder: Path, tables: Iterable[str]) -> None:
    """Copy the results of some tables from a folder beside this file, one file a table."""
    RESULTS.mkdir(exist_ok=True)
    for table in tables:
        finished = [(run, path) for run in runs_of(table) if (path := result_path(folder, run)).is_file()]
        rows = [
            {"arm": run.arm, "seed": run.seed, **json.loads(path.read_text(encoding="utf-8"))}
            for run, path in finished
        ]
        if rows:
            (RESULTS / f"{table}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def table_of(name: str) -> str:
    """Return a table in Markdown: of each arm the mean and the standard deviation over its seeds, in %."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    fields = read_table(name)
    columns = columns_of(fields)
    heads = ["", *columns, "seeds", "CPU s", "paper"]
    paper = any("paper" in arm for arm in fields["arms"].values())
    lines = []
    for arm, settings in fields["arms"].items():
        runs = [row for row in rows if row["arm"] == arm]
        if not runs:
            continue
        cells = [spread([100 * value(row, keys) for row in runs]) for keys in columns.values()]
        # The first run also makes what others share, and some find their model made.
        seconds = f"{median(row['cpu_seconds'] for row in runs):.0f}"
        lines.append([arm, *cells, str(len(runs)), seconds, str(settings.get("paper", ""))])
    keep = [True] * (len(columns) + 1) + [fields.get("kind") != CAPTIONS] * 2 + [paper]
    lines = [heads, ["---", *["---:"] * (len(columns) + 2), "---"], *lines]
    return "\n".join(
        f"| {' | '.join(cell for cell, kept in zip(line, keep, strict=True) if kept)} |" for line in lines
    )


def columns_of(fields: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the scores of each column of a table, whose mean is shown."""
    if "columns" in fields:
        return {title: (key,) for key, title in fields["columns"].items()}
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
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def draw_all() -> None:
    """Draw every table that has results."""
    for path in sorted(TABLES.glob("*.yaml")):
        if (RESULTS / f"{path.stem}.json").is_file() and read_table(path.stem).get("kind") != CAPTIONS:
            draw(path.stem)


def draw(name: str) -> None:
    """Draw a table as `plots/NAME.svg`: for each of its plotted columns, mean and standard deviation of every arm."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    fields = read_table(name)
    columns = columns_of(fields)
    titles = fields.get("plot", [title for title in columns if title.endswith("R@10")][:3] or [*columns][:3])
    arms = [arm for arm in fields["arms"] if any(row["arm"] == arm for row in rows)]
    figure, axes = panels(len(titles), 1 + 0.26 * len(arms))
    for axis, title in zip(axes, titles, strict=True):
        for position, arm in enumerate(arms):
            values = [100 * value(row, columns[title]) for row in rows if row["arm"] == arm]
            error = stdev(values) if len(values) > 1 else 0
            axis.errorbar(mean(values), position, xerr=error, fmt="o", capsize=3, color="tab:blue")
        axis.set(title=f"{title}, %", yticks=range(len(arms)), yticklabels=arms if axis is axes[0] else [])
        axis.invert_yaxis()
        axis.set_xlim(left=0)
    PLOTS.mkdir(exist_ok=True)
    # The same bytes from the same results.
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(PLOTS / f"{name}.svg", metadata={"Date": None})


def write(page: Path = HERE / "README.md") -> None:
    """Put every table between its marks in the report."""
    text = page.read_text(encoding="utf-8")
    for name in sorted(path.stem for path in TABLES.glob("*.yaml")):
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = text.split(begin, 1)
        has_results = (RESULTS / f"{name}.json").is_file()
        shown = table_of(name) if has_results else f"Not measured yet: `make study TABLE={name}`."
        if (PLOTS / f"{name}.svg").is_file():
            shown += f"\n\n![{read_table(name)['title']}](plots/{name}.svg)"
        text = f"{before}{begin}\n{shown}\n{end}{rest.split(end, 1)[1]}"
    page.write_text(text, encoding="utf-8")
