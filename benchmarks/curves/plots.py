"""Plots of the curves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.curves.points import CAPTIONS

# The colour-blind safe palette of Okabe and Ito; markers distinguish the lines too.
STYLES = [
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
]  # fmt: skip
Points = dict[str, list[tuple[float, dict[str, float]]]]


def draw(curve: str, points: Points, place: str, path: Path) -> None:
    """Plot a curve.

    Args:
        curve: Name of the curve.
        points: Pairs of x and figures for every contestant.
        place: Machine and date, printed below the plot.
        path: The PNG file.
    """
    panels = PANELS[curve]
    figure = Figure(figsize=(7.2 * len(panels), 4.8), dpi=120, layout="constrained")
    for number, (title, unit, value, logarithmic) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        _lines(axes, points, value, logarithmic)
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
        axes.set_xlabel(X_LABELS[curve])
        axes.set_ylabel(unit)
    figure.supxlabel(place, fontsize=8, color="#555555", x=0.01, ha="left")
    figure.savefig(path)


def _lines(axes: Axes, points: Points, value: Callable[[dict[str, float]], float], logarithmic: bool) -> None:
    ends = []
    for (name, measured), (colour, marker) in zip(points.items(), STYLES, strict=False):
        xs, ys = [x for x, _ in measured], [value(figures) for _, figures in measured]
        if not any(ys):
            continue
        axes.plot(xs, ys, color=colour, marker=marker, linewidth=2, markersize=6)
        found = measured[-1][1].get("found", 1.0)
        ends.append((xs[-1], ys[-1], name if found > 0.9995 else f"{name} (finds {found:.0%})", colour))
    if logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
        xs = sorted({x for measured in points.values() for x, _ in measured})
        axes.set_xticks(xs, [_short(x) for x in xs])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xticks(sorted({x for measured in points.values() for x, _ in measured}))
        axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, ends)
    axes.margins(x=0.03)


def _label(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write names at the ends of the lines, moved apart where they would overlap."""
    # Positions depend on the limits of the axes.
    axes.autoscale_view()
    low = float("-inf")
    for x, y, name, colour in sorted(ends, key=lambda end: axes.transData.transform(end[:2])[1]):
        place = axes.transData.transform((x, y))[1]
        moved = max(place, low)
        low = moved + 17
        axes.annotate(
            name, (x, y), (9, (moved - place) * 72 / axes.figure.dpi), textcoords="offset points", color=colour,
            va="center", fontsize=10, annotation_clip=False,
        )  # fmt: skip


def _short(x: float) -> str:
    if x % 1024 == 0:
        return f"{x / 1024:.0f}k"
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k"


PANELS: dict[str, list[tuple[str, str, Callable[[dict[str, Any]], float], bool]]] = {
    "loss": [
        (
            "Contrastive loss, forward and backward, width 512",
            "peak memory above the inputs (MiB)",
            lambda figures: figures["memory"] / 2**20,
            True,
        )
    ],
    "encode": [
        (
            f"Encoding {CAPTIONS} captions, Llama of 27M parameters",
            "CPU time (s)",
            lambda figures: figures["cpu"],
            False,
        )
    ],
    "search": [
        (
            "The 10 best for 1,000 queries",
            "time per query (ms)",
            lambda figures: figures["search"] * 1e3,
            True,
        ),
        ("Building the index", "time (s)", lambda figures: figures["build"], True),
    ],
}
X_LABELS = {
    "loss": "batch size",
    "encode": "share of long captions (per cent); the others are a tenth as long",
    "search": "vectors of width 512",
}
