"""Bootstrap intervals: compared with drawing the queries or images themselves, and reproducible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from llm2clip.evaluation.bootstrap import bootstrap_interval, bootstrap_ratios, intervals_of
from llm2clip.evaluation.data import HardNegativeData, MultilingualData, RetrievalData
from llm2clip.evaluation.graded_data import GradedData
from llm2clip.evaluation.protocols.choices import CaptionChoice
from llm2clip.evaluation.protocols.graded import GradedPrecision
from llm2clip.evaluation.protocols.retrieval import MultilingualRetrieval, RetrievalProtocol
from tests.llm2clip.evaluation.fake_session import FakeSession, numbered_images


def naive(draw: Callable[[np.random.Generator], Any], resamples: int = 4000) -> Any:
    """The ends of the interval of what is drawn, one resample after another."""
    generator = np.random.default_rng(7)
    return np.nanquantile([draw(generator) for _ in range(resamples)], [0.025, 0.975], axis=0).T.tolist()


def naive_interval(values: Tensor, strata: Tensor | None = None) -> list[float]:
    """Draw the queries themselves."""
    parts = [values.numpy()] if strata is None else [values[strata == part].numpy() for part in strata.unique()]
    return naive(lambda generator: np.mean([generator.choice(part, len(part)).mean() for part in parts]))


@pytest.mark.parametrize("parts", [None, 3])
@pytest.mark.parametrize("kind", ["hits", "shares"])
def test_an_interval_is_that_of_drawn_queries(kind: str, parts: int | None) -> None:
    torch.manual_seed(0)
    values = (torch.rand(400) < 0.3).double() if kind == "hits" else torch.rand(400).double()
    strata = None if parts is None else torch.randint(parts, (400,))
    assert bootstrap_interval(values, strata) == pytest.approx(naive_interval(values, strata), abs=0.006)


def test_parts_are_drawn_apart() -> None:
    """Within each part all values are equal, so that the mean of the parts is the same in every resample."""
    values, strata = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([7, 2, 2, 2])
    assert bootstrap_interval(values, strata) == [0.5, 0.5]
    assert bootstrap_interval(values)[1] > 0.5


@pytest.mark.parametrize("hit", [0.0, 1.0])
@pytest.mark.parametrize(("queries", "images"), [(1000, None), (50, None), (1000, 200)])
def test_where_all_hit_or_all_miss_the_interval_is_wilsons(hit: float, queries: int, images: int | None) -> None:
    """Resamples of equal values are equal, which says nothing of the next query."""
    clusters = None if images is None else torch.arange(queries) % images
    count = images or queries
    expected = binomtest(int(hit * count), count).proportion_ci(0.95, method="wilson")
    found = bootstrap_interval(torch.full((queries,), hit), clusters=clusters)
    assert found == pytest.approx([expected.low, expected.high], abs=1e-9)
    assert hit in found


def test_a_small_part_of_only_hits_makes_the_interval_of_a_mean_of_parts_wide() -> None:
    hits, small = torch.ones(1010), torch.tensor([0] * 10 + [1] * 1000)
    (low, high), (alone, _), (large, _) = (
        bootstrap_interval(hits, small), bootstrap_interval(hits[:10]), bootstrap_interval(hits)
    )  # fmt: skip
    assert high == 1
    assert alone < low < large


def naive_clusters(values: Tensor, strata: Tensor, clusters: Tensor) -> list[float]:
    """Draw the images themselves, each with all its queries in all parts."""
    parts, images = strata.unique().tolist(), clusters.unique().tolist()
    own = {image: [values[(clusters == image) & (strata == part)].tolist() for part in parts] for image in images}

    def draw(generator: np.random.Generator) -> Any:
        drawn = [own[image] for image in generator.choice(images, len(images)).tolist()]
        of_parts = [[value for queries in drawn for value in queries[part]] for part in range(len(parts))]
        return np.mean([np.mean(part) for part in of_parts if part])

    return naive(draw, 2000)


@pytest.mark.parametrize("kind", ["hits", "shares"])
@pytest.mark.parametrize("languages", [1, 3])
def test_images_are_drawn_with_all_their_queries_of_all_languages(kind: str, languages: int) -> None:
    """Images of one to six captions; languages have different ones, of which an image finds about as many."""
    torch.manual_seed(0)
    clusters = torch.cat([torch.arange(80).repeat_interleave(torch.randint(1, 7, (80,))) for _ in range(languages)])
    strata = torch.randint(languages, (len(clusters),))
    ease = torch.rand(80)[clusters]
    values = (torch.rand(len(clusters)) < ease).double() if kind == "hits" else ease.double() ** (1 + strata)
    found, expected = bootstrap_interval(values, strata, clusters), naive_clusters(values, strata, clusters)
    assert found == pytest.approx(expected, abs=0.008)
    alone = bootstrap_interval(values, strata)
    assert found[1] - found[0] > 1.2 * (alone[1] - alone[0])


def test_protocols_draw_images() -> None:
    """All captions of an image find it or none do, in each language."""
    torch.manual_seed(0)
    count = 60
    images = numbered_images(count)
    rows, owners = torch.eye(count), torch.arange(count).repeat_interleave(5)
    shown = torch.where(torch.rand(count) < 0.5, torch.arange(count), (torch.arange(count) + 1) % count)
    texts = [f"caption {row}" for row in range(5 * count)]
    session = FakeSession(rows, dict(zip(texts, rows[shown[owners]], strict=True)))
    expected = bootstrap_interval((shown == torch.arange(count)).double())
    plain = RetrievalData(images, texts, owners)
    judged = GradedData(
        images,
        texts,
        owners,
        image_ids=list(range(count)),
        text_ids=list(range(len(texts))),
        text_qrels={text: [owner] for text, owner in enumerate(owners.tolist())},
        image_qrels={image: [5 * image + number for number in range(5)] for image in range(count)},
    )
    several = MultilingualData({language: RetrievalData(images, texts, owners) for language in ("de", "en")})
    for protocol, data, name in (
        (RetrievalProtocol(), plain, "text_to_image_recall@1"),
        (MultilingualRetrieval(), several, "text_to_image_recall@1"),
        (GradedPrecision(), judged, "text_to_image_map@r"),
    ):
        measured = protocol.measure(session, data)  # type: ignore[attr-defined]
        assert intervals_of(measured)[name] == pytest.approx(expected, abs=1e-9), name
    # A choice of each of five kinds: the wrong caption is that of the next image.
    wrong = [texts[(row + 5) % len(texts)] for row in range(len(texts))]
    choices = HardNegativeData(images, owners, texts, wrong, [f"add_{row % 5}" for row in range(len(texts))])
    found = intervals_of(CaptionChoice().measure(session, choices))
    hits = CaptionChoice().measure(session, choices).values["accuracy"].view(-1, 5)[:, 0]
    assert found["accuracy"] == found["add_accuracy"] == pytest.approx(bootstrap_interval(hits), abs=1e-9)


def ratios(sums: Tensor) -> dict[str, Tensor]:
    """The mean of two ratios of sums; NaN where a sum is zero."""
    return {"mean": (sums[..., :2] / sums[..., 2:]).nanmean(dim=-1), "first": sums[..., 0] / sums[..., 2]}


def some_counts(images: int) -> Tensor:
    """Of images of very different sizes, of which the larger are better: hits of two classes, and their pixels."""
    torch.manual_seed(2)
    pixels = torch.randint(10, 10**6, (images, 2)) ** 2 // 10**6
    return torch.cat([(pixels * torch.rand(images, 2) * pixels / 10**6).long(), pixels], dim=1)


def test_the_interval_of_a_ratio_of_sums_is_that_of_drawn_images(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = some_counts(150)
    found = bootstrap_ratios(counts, ratios)

    def draw(generator: np.random.Generator) -> list[Tensor]:
        drawn = counts.numpy()[generator.integers(0, len(counts), len(counts))].sum(axis=0)
        return list(ratios(torch.from_numpy(drawn).double()).values())

    for name, expected in zip(("mean", "first"), naive(draw), strict=True):
        assert found[name] == pytest.approx(expected, abs=0.006)
        assert found[name][0] < ratios(counts.sum(dim=0).double())[name] < found[name][1]
    # A mean of the images' own ratios would weigh small images as much as large ones.
    own = bootstrap_interval(counts[:, 0] / counts[:, 2].clamp(min=1))
    assert own != pytest.approx(found["first"], abs=0.02)
    monkeypatch.setattr("llm2clip.evaluation.bootstrap.BLOCK", 450)
    assert bootstrap_ratios(counts, ratios) == found


def test_resamples_without_a_score_are_left_out() -> None:
    """One image of three has pixels of the first class: 8 of 27 resamples have none."""
    counts = torch.tensor([[5, 1, 10, 2], [0, 1, 0, 2], [0, 1, 0, 2]])
    assert bootstrap_ratios(counts, ratios)["first"] == [0.5, 0.5]
