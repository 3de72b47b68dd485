"""Confidence intervals of scores, from resampled queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
# Draws at once: 32 MiB of counts.
BLOCK = 1 << 22


def bootstrap_intervals(
    values: Mapping[str, Tensor], strata: Mapping[str, Tensor] | None = None, seed: int = SEED
) -> dict[str, list[float]]:
    """Compute the 95% percentile bootstrap interval of the mean of each row of values.

    Queries are drawn with replacement, each on its own: captions of one image count as independent.

    Args:
        values: `(queries,)` by score.
        strata: Part of each query, `(queries,)` int64, of scores that are the mean over parts of their means; queries
            are drawn within their part.

    Returns:
        Lower and upper end by score.
    """
    parts = strata or {}
    return {name: bootstrap_interval(row, parts.get(name), seed) for name, row in values.items()}


def bootstrap_interval(values: Tensor, strata: Tensor | None = None, seed: int = SEED) -> list[float]:
    """Compute one interval; see [`bootstrap_intervals`]."""
    generator = np.random.default_rng(seed)
    parts = [values] if strata is None else _split(values, strata)
    means = sum(_resampled_means(part.double().numpy(), generator) for part in parts) / len(parts)
    tail = (1 - LEVEL) / 2
    return np.quantile(means, [tail, 1 - tail]).tolist()


def bootstrap_ratios(
    counts: Tensor, scores: Callable[[Tensor], Mapping[str, Tensor]], seed: int = SEED
) -> dict[str, list[float]]:
    """Compute the 95% percentile bootstrap intervals of scores of sums over images, such as a mean IoU.

    Images are drawn with replacement and their counts added up; a resample without a score is left out.

    Args:
        counts: `(images, columns)` int64.
        scores: Computes scores by name, `(resamples,)`, from sums `(resamples, columns)` float64.

    Returns:
        Lower and upper end by score.
    """
    generator, rows = np.random.default_rng(seed), max(1, BLOCK // max(counts.shape))
    images, summands = len(counts), counts.double()
    blocks = []
    for start in range(0, RESAMPLES, rows):
        draws = generator.multinomial(images, np.full(images, 1 / images), size=min(rows, RESAMPLES - start))
        blocks.append(scores(torch.from_numpy(draws).double() @ summands))
    tail = (1 - LEVEL) / 2
    return {
        name: np.nanquantile(torch.cat([block[name] for block in blocks]).numpy(), [tail, 1 - tail]).tolist()
        for name in blocks[0]
    }


def _split(values: Tensor, strata: Tensor) -> list[Tensor]:
    order = strata.argsort(stable=True)
    sizes = strata.unique(return_counts=True)[1].tolist()
    return list(values[order].split(sizes))


def _resampled_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw the mean of each resample, `(RESAMPLES,)`.

    How often each value is drawn is multinomial, so that the thousands of hits and misses of a recall are two numbers
    to draw and not thousands.
    """
    distinct, counts = np.unique(values, return_counts=True)
    rows = max(1, BLOCK // len(distinct))
    blocks = [
        generator.multinomial(len(values), counts / len(values), size=min(rows, RESAMPLES - start)) @ distinct
        for start in range(0, RESAMPLES, rows)
    ]
    return np.concatenate(blocks) / len(values)
