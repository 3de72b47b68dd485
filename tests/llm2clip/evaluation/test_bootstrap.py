"""Bootstrap intervals: compared with drawing the queries themselves, and reproducible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llm2clip.evaluation.bootstrap import bootstrap_interval, bootstrap_intervals, bootstrap_ratios


def naive_interval(values: Tensor, strata: Tensor | None = None, resamples: int = 4000) -> list[float]:
    """Draw the queries themselves, one resample after another."""
    generator = np.random.default_rng(7)
    parts = [values] if strata is None else [values[strata == part] for part in strata.unique()]
    means = []
    for _ in range(resamples):
        drawn = [part.numpy()[generator.integers(0, len(part), len(part))].mean() for part in parts]
        means.append(sum(drawn) / len(drawn))
    return np.quantile(means, [0.025, 0.975]).tolist()


@pytest.mark.parametrize("kind", ["hits", "shares"])
def test_an_interval_is_that_of_drawn_queries(kind: str) -> None:
    torch.manual_seed(0)
    values = (torch.rand(400) < 0.3).double() if kind == "hits" else torch.rand(400).double()
    assert bootstrap_interval(values) == pytest.approx(naive_interval(values), abs=0.006)


def test_parts_are_drawn_apart() -> None:
    """Within each part all values are equal, so that the mean of the parts is the same in every resample."""
    values, strata = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([7, 2, 2, 2])
    assert bootstrap_interval(values, strata) == [0.5, 0.5]
    assert bootstrap_interval(values)[1] > 0.5
    torch.manual_seed(1)
    values, strata = (torch.rand(500) < 0.6).double(), torch.randint(3, (500,))
    values[strata == 1] = 1
    assert bootstrap_interval(values, strata) == pytest.approx(naive_interval(values, strata), abs=0.006)


def test_an_interval_depends_on_the_seed_and_not_on_the_order_of_scores() -> None:
    torch.manual_seed(0)
    values = {name: (torch.rand(100) < 0.5).double() for name in ("a", "b")}
    found = bootstrap_intervals(values)
    assert found == bootstrap_intervals(dict(reversed(values.items())))
    assert found["a"][0] < values["a"].mean() < found["a"][1]
    assert bootstrap_interval(torch.rand(50)) != bootstrap_interval(torch.rand(50), seed=1)


def test_many_distinct_values_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    values = torch.rand(300)
    whole = bootstrap_interval(values)
    monkeypatch.setattr("llm2clip.evaluation.bootstrap.BLOCK", 900)
    assert bootstrap_interval(values) == whole


def ratios(sums: Tensor) -> dict[str, Tensor]:
    """The mean of two ratios of sums; NaN where a sum is zero."""
    return {"mean": (sums[..., :2] / sums[..., 2:]).nanmean(dim=-1), "first": sums[..., 0] / sums[..., 2]}


def naive_ratios(counts: Tensor, resamples: int = 4000) -> dict[str, list[float]]:
    """Draw the images themselves, one resample after another."""
    generator = np.random.default_rng(7)
    drawn = [counts.numpy()[generator.integers(0, len(counts), len(counts))].sum(axis=0) for _ in range(resamples)]
    scores = ratios(torch.from_numpy(np.stack(drawn)).double())
    return {name: np.nanquantile(score.numpy(), [0.025, 0.975]).tolist() for name, score in scores.items()}


def some_counts(images: int) -> Tensor:
    """Of images of very different sizes, of which the larger are better: hits of two classes, and their pixels."""
    torch.manual_seed(2)
    pixels = torch.randint(10, 10**6, (images, 2)) ** 2 // 10**6
    return torch.cat([(pixels * torch.rand(images, 2) * pixels / 10**6).long(), pixels], dim=1)


def test_the_interval_of_a_ratio_of_sums_is_that_of_drawn_images(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = some_counts(150)
    found, expected = bootstrap_ratios(counts, ratios), naive_ratios(counts)
    for name in ("mean", "first"):
        assert found[name] == pytest.approx(expected[name], abs=0.006)
        assert found[name][0] < ratios(counts.sum(dim=0).double())[name] < found[name][1]
    # A mean of the images' own ratios would weigh small images as much as large ones.
    own = bootstrap_interval(counts[:, 0] / counts[:, 2].clamp(min=1))
    assert own != pytest.approx(found["first"], abs=0.02)
    monkeypatch.setattr("llm2clip.evaluation.bootstrap.BLOCK", 450)
    assert bootstrap_ratios(counts, ratios) == found
    assert bootstrap_ratios(counts, ratios, seed=1) != found


def test_resamples_without_a_score_are_left_out() -> None:
    """One image of three has pixels of the first class: 8 of 27 resamples have none."""
    counts = torch.tensor([[5, 1, 10, 2], [0, 1, 0, 2], [0, 1, 0, 2]])
    assert bootstrap_ratios(counts, ratios)["first"] == [0.5, 0.5]
