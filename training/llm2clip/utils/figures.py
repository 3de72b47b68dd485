"""Figures for files: no window system is needed."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def panels(count: int) -> tuple[Figure, Any]:
    """Return a figure with a row of panels, and the axes of each."""
    figure = Figure(figsize=(5 * count, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes
