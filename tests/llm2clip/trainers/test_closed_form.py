"""Alignment in closed form: the mathematics, Stores, and stage 2 with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from llm2clip.store import EmbeddingCache, build_embedding_cache, caption_manifest
from llm2clip.store.shards import ShardFile
from llm2clip.trainers import closed_form
from llm2clip.trainers.closed_form import PairSums, closed_form_alignment, cross_validated_ridge, positive_deviation


def correlated(count: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of widths 12 and 9 that share five directions, far from zero and on different scales."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, 5, generator=generator)
    images = shared @ torch.randn(5, 12, generator=generator) + 0.5 * torch.randn(count, 12, generator=generator)
    texts = shared @ torch.randn(5, 9, generator=generator) + 0.5 * torch.randn(count, 9, generator=generator)
    return images * torch.linspace(0.1, 10, 12) + 3, texts + 4


def test_without_a_ridge_it_is_canonical_correlation_analysis() -> None:
    images, texts = correlated()
    found = closed_form_alignment(images, texts, ridge=0.0, width=3)
    units = F.normalize(texts, dim=-1)
    expected = CCA(n_components=3, scale=True, max_iter=20_000, tol=1e-12).fit(images.numpy(), units.numpy())
    own = (images.double() - found.image_mean) / found.image_std @ found.image_map
    theirs = expected.transform(images.numpy())
    for number in range(3):
        assert abs(np.corrcoef(own[:, number], theirs[:, number])[0, 1]) > 0.9999
    correlations = [np.corrcoef(*pair)[0, 1] for pair in zip(*(x.T for x in expected.transform(images, units)))]  # noqa: B905
    np.testing.assert_allclose(found.correlations, correlations, atol=1e-4)
    assert found.embed_images(images).shape == found.embed_texts(texts).shape == (600, 3)


def test_weights_are_repetitions() -> None:
    images, texts = correlated(60)
    weights = torch.tensor([1.0, 2.0, 3.0]).repeat(20)
    found = closed_form_alignment(images, texts, width=4, weights=weights)
    times = weights.long()
    expected = closed_form_alignment(images.repeat_interleave(times, 0), texts.repeat_interleave(times, 0), width=4)
    torch.testing.assert_close(found.embed_images(images), expected.embed_images(images), atol=1e-6, rtol=0)


def test_a_constant_feature_is_not_divided_by_its_rounding() -> None:
    std = torch.tensor([0.0, 2e-5, 0.5])
    assert positive_deviation(torch.full((3,), 50.0), std).tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("weighted", [True, False])
def test_parts_of_the_rows_add_up_to_the_whole(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "BLOCK", 64)
    monkeypatch.setattr(closed_form, "TILE", 5)
    images, texts = correlated()
    images = images + 1000  # the sums stay accurate far from zero
    weights = torch.rand(600) if weighted else None
    parts = [PairSums.of_part(images, texts, part, 7, weights) for part in range(7)]
    x, y = images.double(), F.normalize(texts, dim=-1).double()
    w = torch.ones(600).double() if weights is None else weights.double()
    total = sum(parts, PairSums.empty(12, 9))
    for found, expected in [
        (total.weight, w.sum()[None]),
        (total.image_sum, w @ x),
        (total.text_sum, w @ y),
        (total.image_gram, (x.T * w) @ x),
        (total.text_gram, (y.T * w) @ y),
        (total.cross, (x.T * w) @ y),
    ]:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)
    assert torch.equal(total.text_gram, total.text_gram.T)
    one, whole = total.solver().solve(0.3, 4), closed_form_alignment(images, texts, 0.3, 4, weights)
    torch.testing.assert_close(one.embed_images(images), whole.embed_images(images), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="part is 7 of 7; number the parts from 0 to 6"):
        PairSums.of_part(images, texts, 7, 7)


def test_the_regression_of_summed_parts_is_ridge_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "BLOCK", 64)
    images, texts = correlated()
    total = sum((PairSums.of_part(images, texts, part, 7) for part in range(7)), PairSums.empty(12, 9))
    x, y = images.double().numpy(), F.normalize(texts, dim=-1).double().numpy()
    for ridge in (0.01, 1.0):
        ((weight, bias),) = total.regressions([ridge])
        expected = Ridge(alpha=ridge * y.var(axis=0).mean() * len(y)).fit(y, x)
        np.testing.assert_allclose(weight.T, expected.coef_, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(bias, expected.intercept_, rtol=1e-6, atol=1e-8)


def test_stores_are_read_shard_by_shard_and_without_keys(tmp_path: Path) -> None:
    images, texts = correlated()
    folders = stores(tmp_path, images, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardFile, "keys", lambda _: pytest.fail("keys were read"))
        found = closed_form_alignment(*folders, width=4)
    expected = closed_form_alignment(images.half().float(), texts.half().float(), width=4)
    opened = closed_form_alignment(EmbeddingCache.open(folders[0]), texts.half(), width=4)
    for one in (found, opened):
        torch.testing.assert_close(one.embed_images(images), expected.embed_images(images), atol=1e-5, rtol=0)


def stores(tmp_path: Path, images: Tensor, texts: Tensor) -> list[Path]:
    """Write rows as two Stores, `images` and `texts`, whose shards have different sizes."""
    folders = []
    for name, rows in (("images", images), ("texts", texts)):
        captions = [f"{name} {row}" for row in range(len(rows))]
        embeds = dict(zip(captions, rows.half(), strict=True))
        options: dict[str, Any] = {"pooling": "mean", "prompt_prefix": "", "prompt_suffix": "", "max_length": 8}
        manifest = caption_manifest(name, "f", width=rows.shape[1], **options)

        def embed(part: list[str], rows: dict[str, Tensor] = embeds) -> tuple[Tensor, int]:
            return torch.stack([rows[text] for text in part]), 0

        build_embedding_cache(tmp_path / name, captions, embed, manifest, shard_size=70 + len(name))
        folders.append(tmp_path / name)
    return folders


@pytest.mark.parametrize(
    ("images", "texts", "changes", "message"),
    [
        (600, 600, {"width": 10}, "width is 10, but the embeddings have 12 and 9 dimensions; choose 1 to 9"),
        (600, 600, {"ridge": -1.0}, "ridge must be at least 0"),
        (600, 600, {"weights": torch.ones(3)}, "600 and 600 and 3 weights"),
        (600, 599, {}, "there are 600 and 599"),
        (1, 1, {}, "at least two pairs"),
        (601, 601, {}, "not finite"),
    ],
)
def test_what_cannot_be_is_refused(images: int, texts: int, changes: dict[str, Any], message: str) -> None:
    rows = correlated(601)
    rows[0][600, 3] = float("nan")
    with pytest.raises(ValueError, match=message):
        closed_form_alignment(rows[0][:images], rows[1][:texts], **{"width": 4, **changes})


def test_the_ridge_is_the_largest_within_one_standard_error_in_cross_validation() -> None:
    images, texts = correlated(60)
    ridges, parts = (0.001, 0.01, 0.1, 1.0, 10.0), 5
    rows = [torch.arange(60) % parts == part for part in range(parts)]
    errors = np.empty((parts, len(ridges)))
    for part, held_out in enumerate(rows):
        units = F.normalize(texts, dim=-1).double()
        x, y, unseen = images[~held_out].double(), units[~held_out], units[held_out]
        for column, ridge in enumerate(ridges):
            penalty = ridge * float(y.var(dim=0, correction=0).mean()) * len(y)
            expected = Ridge(alpha=penalty).fit(y.numpy(), x.numpy()).predict(unseen.numpy())
            errors[part, column] = ((images[held_out].numpy() - expected) ** 2).sum(axis=1).mean()
    means, deviations = errors.mean(axis=0), errors.std(axis=0, ddof=1) / parts**0.5
    allowed = means <= means.min() + deviations[means.argmin()]
    folds = [PairSums.of_part(images[part], texts[part]) for part in rows]
    found = cross_validated_ridge(folds, ridges)
    assert found == max(np.array(ridges)[allowed])
    assert found > ridges[int(means.argmin())]
