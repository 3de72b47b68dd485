"""Metrics for the evaluate library: folders for `evaluate.load`."""

from __future__ import annotations

from pathlib import Path


def metric_path(name: str) -> str:
    """Return the folder of a metric: `evaluate.load(metric_path("retrieval_recall"))`."""
    return str(Path(__file__).parent / name)
