"""Metrics for the evaluate library: folders for `evaluate.load`."""

from __future__ import annotations

from pathlib import Path

METRICS = ("retrieval_recall",)


def metric_path(name: str) -> str:
    """Return the folder of a metric: `evaluate.load(metric_path("retrieval_recall"))`.

    Raises:
        ValueError: There is no metric of that name.
    """
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; choose one of {', '.join(METRICS)}.")
    return str(Path(__file__).parent / name)
