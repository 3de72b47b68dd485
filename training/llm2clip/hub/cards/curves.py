"""Training curves for a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llm2clip.hub.cards.facts import CURVES


def write_curves(folder: Path, history: Sequence[Mapping[str, Any]]) -> bool:
    """Draw loss and recall over the steps as `training_curves.png`; returns whether there was anything to draw.

    Args:
        folder: Folder of the image.
        history: `log_history` of the Trainer: entries with `step`, and `loss` or `eval_*` metrics.
    """
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    recalls: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name.startswith("eval_") and "recall@10" in name:
                recalls.setdefault(name.removeprefix("eval_"), []).append((entry["step"], value))
    if not losses and not recalls:
        return False
    panels = bool(losses) + bool(recalls)
    figure = Figure(figsize=(5 * panels, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if losses:
        axes[0].plot(*zip(*losses, strict=True), marker="." if len(losses) < 30 else None)
        axes[0].set(title="Training loss", xlabel="step", ylabel="loss")
    if recalls:
        for name, points in recalls.items():
            axes[-1].plot(*zip(*points, strict=True), marker=".", label=name.replace("_", " "))
        axes[-1].set(title="Validation", xlabel="step", ylabel="recall@10")
        axes[-1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(folder / CURVES, dpi=110)
    return True
