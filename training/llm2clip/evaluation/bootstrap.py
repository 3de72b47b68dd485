"""Confidence intervals of scores, from resampled queries or images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from llm2clip.evaluation.benchmark import Measurement

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
# Draws at once: 32 MiB of counts.
BLOCK = 1 << 22
# A score may differ by this from the mean of its values, which are float32.
ROUNDING = 1e-5


def intervals_of(measurement: Measurement) -> dict[str, list[float]]:
    """Compute the intervals of the scores whose values or counts are known; see [`bootstrap_interval`].

    Raises:
        ValueError: The values of a score do not average to it, which is an error of the protocol.
    """
    means = {name: _mean(values, measurement.strata.get(name)) for name, values in measurement.values.items()}
    summed = measurement.summed
    if summed is not None:
        means |= {name: score.item() for name, score in summed.scores(summed.counts.sum(dim=0).double()).items()}
    for name, mean in means.items():
        if not abs(mean - measurement.scores.get(name, torch.nan)) < ROUNDING:
            raise ValueError(
                f"the values of {name} average to {mean}, but its score is {measurement.scores.get(name)}."
            )
    intervals = {
        name: bootstrap_interval(values, measurement.strata.get(name), measurement.clusters.get(name))
        for name, values in measurement.values.items()
    }
    return intervals if summed is None else intervals | bootstrap_ratios(summed.counts, summed.scores)


def _mean(values: Tensor, strata: Tensor | None) -> float:
    if strata is None:
        return values.double().mean().item()
    parts, numbers = strata.unique(return_inverse=True)
    sums = values.new_zeros(len(parts), dtype=torch.float64).index_add_(0, numbers, values.double())
    return (sums / torch.bincount(numbers)).mean().item()


def bootstrap_interval(values: Tensor, strata: Tensor | None = None, clusters: Tensor | None = None) -> list[float]:
    """Compute the 95% percentile bootstrap interval of a mean; where all values are 0 or all are 1, Wilson's.

    Resamples of equal values are equal, as if nothing else could be drawn.

    Args:
        values: `(queries,)`.
        strata: Part of each query, `(queries,)` int64, if the score is the mean over parts of their means. Queries are
            drawn within their part.
        clusters: Image of each query, `(queries,)` int64, if an image has several: the captions of an image are
            found or missed together. Images are drawn, with all their queries, also of several parts (languages).

    Returns:
        Lower and upper end.
    """
    generator = np.random.default_rng(SEED)
    parts = torch.zeros(len(values), dtype=torch.int64) if strata is None else strata.unique(return_inverse=True)[1]
    if bool((values == values[0]).all()) and values[0] in (0, 1):
        # As many as would give a mean of parts its variance; with clusters, these are drawn.
        drawn_queries = len(parts.unique()) ** 2 / (1 / torch.bincount(parts).double()).sum().item()
        return _wilson_at_edge(drawn_queries if clusters is None else len(clusters.unique()), int(values[0]))
    if clusters is not None:
        return _ends(_resampled_ratios(*_sums(values, parts, clusters), generator))
    of_parts = [values[parts == number][:, None] for number in range(int(parts.max()) + 1)]
    drawn = [_resampled_ratios(part, torch.ones_like(part, dtype=torch.int64), generator) for part in of_parts]
    return _ends(np.mean(drawn, axis=0))


def bootstrap_ratios(counts: Tensor, scores: Callable[[Tensor], Mapping[str, Tensor]]) -> dict[str, list[float]]:
    """Compute the 95% percentile bootstrap intervals of scores of sums over images, such as a mean IoU.

    Images are drawn with replacement and their counts added up; a resample without a score is left out.

    Args:
        counts: `(images, columns)` int64.
        scores: Computes scores by name, `(resamples,)`, from sums `(resamples, columns)` float64.

    Returns:
        Lower and upper end by score.
    """
    generator, summands = np.random.default_rng(SEED), counts.double()
    blocks = [scores(drawn @ summands) for drawn in _draws(np.ones(len(counts)), max(counts.shape), generator)]
    return {name: _ends(torch.cat([block[name] for block in blocks]).numpy()) for name in blocks[0]}


def _wilson_at_edge(count: float, hit: int) -> list[float]:
    """Wilson's interval of a share of which all draws are misses (0) or hits (1)."""
    squared = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    reach = squared / (count + squared)
    return [1 - reach, 1.0] if hit else [0.0, reach]


def _sums(values: Tensor, parts: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of values and the number of queries of each image in each part, `(images, parts)` each."""
    images, owners = clusters.unique(return_inverse=True)
    shape = len(images), int(parts.max()) + 1
    cells = owners * shape[1] + parts
    sums = torch.zeros(shape[0] * shape[1], dtype=torch.float64).index_add_(0, cells, values.double())
    return sums.view(shape), torch.bincount(cells, minlength=len(sums)).view(shape)


def _resampled_ratios(sums: Tensor, counts: Tensor, generator: np.random.Generator) -> np.ndarray:
    """Draw rows, and compute the mean over columns of sum / count of each resample, `(RESAMPLES,)`.

    How often each row is drawn is multinomial, so that the thousands of hits and misses of a recall are two rows to
    draw and not thousands.
    """
    rows, times = np.unique(torch.cat([sums.double(), counts.double()], dim=1).numpy(), axis=0, return_counts=True)
    tops, bottoms = torch.from_numpy(rows).chunk(2, dim=1)
    drawn = [
        ((draws @ tops) / (draws @ bottoms)).nanmean(dim=1) for draws in _draws(times, max(rows.shape), generator)
    ]
    return torch.cat(drawn).numpy()


def _draws(times: np.ndarray, size: int, generator: np.random.Generator) -> list[Tensor]:
    """Draw how often each row occurs in each resample, `(resamples, rows)` float64 in blocks."""
    block, total = max(1, BLOCK // size), int(times.sum())
    return [
        torch.from_numpy(generator.multinomial(total, times / total, size=min(block, RESAMPLES - start))).double()
        for start in range(0, RESAMPLES, block)
    ]


def _ends(means: np.ndarray) -> list[float]:
    tail = (1 - LEVEL) / 2
    return np.nanquantile(means, [tail, 1 - tail]).tolist()
