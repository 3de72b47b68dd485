"""The loss and validation curves of a run of the quickstart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from llm2clip.quickstart.arms import Arm

PARTS = (
    ("stage2", "frozen", "Stage 2, frozen towers"),
    ("stage2", "unfrozen", "Stage 2, vision layers"),
    ("transfer", "frozen", "Without a domain"),
)
VALIDATION = "eval_validation_text_to_image_recall@10"


def draw_curves(runs: dict[str, Any], arms: Sequence[Arm]) -> Figure:
    """Draw the loss of every run (first seed) above its R@10 on the validation set.

    Args:
        runs: The results of stage 1, and of stage 2 with all arms.
    """
    shown = [part for part in PARTS if any(part[1] in runs.get(f"{part[0]}-{arm.name}", {}) for arm in arms)]
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 1 + len(shown), squeeze=False)
    for (kind, part, title), (upper, lower) in zip(shown, axes.T[1:], strict=True):
        for arm in arms:
            log = runs.get(f"{kind}-{arm.name}", {}).get(part, {}).get("history", [])
            _line(upper, log, "loss", arm.title)
            _line(lower, log, VALIDATION, arm.title, 100)
        upper.set(title=f"{title}: loss")
        lower.set(title="R@10 on validation, %")
    _line(axes[0, 0], runs.get("stage1", {}).get("history", []), "loss", "stage 1")
    axes[0, 0].set(title="Stage 1: loss")
    for axis in axes.flat:
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
    axes[1, 0].axis("off")
    handles = axes[0, 1].get_legend_handles_labels() if shown else ([], [])
    axes[1, 0].legend(*handles, loc="center", fontsize=8)
    return figure


def _line(axis: Any, log: Sequence[dict[str, float]], key: str, label: str, factor: float = 1) -> None:
    # The first value of each step: after the last one, the best model is measured again.
    points = {entry["step"]: factor * entry[key] for entry in reversed(log) if key in entry}
    if points:
        axis.plot(*zip(*sorted(points.items()), strict=True), label=label, marker="." if len(points) < 30 else None)
