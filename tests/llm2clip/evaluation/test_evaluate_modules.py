"""The modules for the evaluate library return the values of the functions behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch

from llm2clip.evaluation import metric_path, retrieval_metrics


def load(name: str, cache: Path) -> Any:
    return evaluate.load(metric_path(name), cache_dir=str(cache), keep_in_memory=True)


def without(counts: set[str], metrics: dict[str, float | int]) -> dict[str, Any]:
    return {name: pytest.approx(value) for name, value in metrics.items() if name not in counts}


def test_rows_are_matching_pairs_by_default(tmp_path: Path) -> None:
    texts, images = torch.randn(2, 30, 8)
    metric = load("retrieval_recall", tmp_path)
    found = metric.compute(text_embeds=texts.numpy(), image_embeds=images)
    expected = retrieval_metrics(images, texts, torch.arange(30)[:, None].expand(-1, 2))
    assert found == without({"num_images_with_text"}, expected)
    with pytest.raises(ValueError, match="there are 3 rows, but image_ids has 2"):
        metric.compute(text_embeds=torch.randn(3, 4), image_embeds=torch.randn(3, 4), image_ids=[0, 1])


@pytest.mark.parametrize("names", [(7, 6, 5, 4, 3), ("train.jpg", "dog.jpg", "école.jpg", "cat.jpg", "bus.jpg")])
def test_rows_with_equal_ids_are_one_image_or_text(names: Sequence[int | str], tmp_path: Path) -> None:
    texts, images = torch.randn(12, 8), torch.randn(5, 8)
    # Text 3 belongs to two images; ids need not start at 0 nor come in order, and may be names.
    pairs = torch.tensor([*((text, text % 5) for text in range(12)), (3, 4)])[torch.randperm(13)]
    metric = load("retrieval_recall", tmp_path)
    for batch in pairs.split(4):
        rows, columns = batch.unbind(1)
        metric.add_batch(text_embeds=texts[rows], image_embeds=images[columns])
    found = metric.compute(text_ids=pairs[:, 0] + 100, image_ids=[names[image] for image in pairs[:, 1]], ks=[1, 2])
    assert found == without({"num_images_with_text"}, retrieval_metrics(images, texts, pairs, ks=(1, 2)))
    assert (found["num_texts"], found["num_images"]) == (12, 5)
