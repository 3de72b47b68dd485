"""Figures for files: no window system is needed."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llm2clip.files.atomic import atomic_file

# Panels in a row.
MOST_COLUMNS = 3


def panels(count: int, height: float = 3.4) -> tuple[Figure, Any]:
    """Return a figure with panels in rows, and the axes of each.

    Args:
        height: Of a row, in inches.
    """
    columns = min(count, MOST_COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(5 * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(alpha=0.3)
    return figure, axes[:count]


def write_figure(path: Path, figure: Figure) -> None:
    """Write a PNG file, unless it is there with the same bytes; see [`atomic_file`]."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    if path.is_file() and path.read_bytes() == drawn.getvalue():
        return
    with atomic_file(path) as file:
        file.write(drawn.getvalue())
