"""Training curves for a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.evaluation.figures import panels, write_figure
from llm2clip.hub.cards.facts import CURVES


def write_curves(folder: Path, history: Sequence[Mapping[str, Any]]) -> bool:
    """Draw loss and recall over the steps as `training_curves.png`; returns whether there was anything to draw.

    Args:
        folder: Folder of the image.
        history: `log_history` of the Trainer: entries with `step`, and `loss` or `eval_*` metrics.
    """
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    recalls = _recalls(history)
    if not losses and not recalls:
        return False
    figure, axes = panels(bool(losses) + bool(recalls))
    if losses:
        axes[0].plot(*zip(*losses, strict=True), marker="." if len(losses) < 30 else None)
        axes[0].set(title="Training loss", xlabel="step", ylabel="loss")
    if recalls:
        # A log that was stored has its names in another order.
        for name, points in sorted(recalls.items()):
            axes[-1].plot(*zip(*points.items(), strict=True), marker=".", label=name.replace("_", " "))
        axes[-1].set(title="Validation", xlabel="step", ylabel="recall@10")
        axes[-1].legend()
    write_figure(folder / CURVES, figure)
    return True


def _recalls(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    results: dict[str, dict[int, float]] = {}
    trains = True
    for entry in history:
        # What is measured after the training is its result, perhaps the best model of an earlier step.
        trains = "loss" in entry or (trains and "train_runtime" not in entry)
        for name, value in entry.items():
            if name.startswith("eval_") and name.endswith("recall@10"):
                (curves if trains else results).setdefault(name.removeprefix("eval_"), {})[entry["step"]] = value
    return results | curves
