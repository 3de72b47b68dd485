"""The linear probe against a direct loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks, choose_benchmarks
from llm2clip.evaluation.benchmarks.listing import list_benchmarks
from llm2clip.evaluation.data import BenchmarkImages, ClassificationData
from llm2clip.evaluation.protocols.linear_probe import LinearProbe
from tests.llm2clip.evaluation.fake_session import FakeSession

CLASSES, WIDTH = 4, 6


def make(**sizes: int) -> tuple[Any, dict[str, Tensor], FakeSession]:
    """A set of parts of some sizes, their features, and a session that knows them; its embeddings are others."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    parts, rows, tables = {}, {}, ({}, {})
    for name, size in sizes.items():
        labels = torch.arange(size) % CLASSES
        features = 3 * (centres[labels] + torch.randn(size, WIDTH, generator=generator))
        images = BenchmarkImages([f"{name} {row}".encode() for row in range(size)])
        parts[name] = ClassificationData(images, labels, [f"class {label}" for label in range(CLASSES)])
        rows[name] = features
        for content, row in zip(images.images, features, strict=True):
            tables[0][content], tables[1][content] = row, row[:4].flip(0)
    data = replace(parts["test"], train=parts.get("train"))
    return data, rows, FakeSession(tables[1], {"": [1.0]}, features=tables[0])


def test_sgd_is_that_of_the_paper() -> None:
    """A direct loop: batches of 1,024 of 1,500 images, constant rate 0.1, momentum 0.9, 50 epochs, raw features."""
    data, rows, session = make(test=200, train=1500)
    found = LinearProbe().measure(session, data)
    weight, bias = torch.zeros(CLASSES, WIDTH, requires_grad=True), torch.zeros(CLASSES, requires_grad=True)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    order = torch.Generator().manual_seed(0)
    for _ in range(50):
        permutation = torch.randperm(1500, generator=order)
        for batch in (permutation[:1024], permutation[1024:]):
            logits = rows["train"][batch] @ weight.T + bias
            loss = torch.nn.functional.cross_entropy(logits, data.train.labels[batch])
            for place, gradient in enumerate(torch.autograd.grad(loss, [weight, bias])):
                velocity[place] = 0.9 * velocity[place] + gradient
            with torch.no_grad():
                weight -= 0.1 * velocity[0]
                bias -= 0.1 * velocity[1]
    right = (rows["test"] @ weight.T + bias).argmax(dim=1) == data.labels
    assert found.values["top1"].tolist() == right.double().tolist()
    assert 0.5 < found.scores["top1"] < 1
    assert found.protocol["features"] == "before projection"
    assert found.counts["train_images"] == 1500


def test_a_set_without_train_images_and_a_diverged_probe_are_refused() -> None:
    data, _, session = make(test=8, train=8)
    with pytest.raises(BenchmarkError, match="needs train images of at least two classes"):
        LinearProbe().measure(session, replace(data, train=None))
    table = session.encoder.features
    session.encoder.features = {content: torch.as_tensor(row) * 1e30 for content, row in table.items()}
    with pytest.raises(BenchmarkError, match="has diverged"):
        LinearProbe().measure(session, data)


def test_probes_are_chosen_by_names_of_their_own() -> None:
    names = ["cifar10-probe-sgd", "fashion-mnist-probe-sgd"]
    found = choose_benchmarks(names, Path())
    assert [benchmark.name for benchmark in found] == names
    assert found[0].counts == all_benchmarks()["cifar10"].counts
    assert "**/train-*.parquet" in found[0].needs
    listed = list_benchmarks([all_benchmarks()[name] for name in ("cifar10", "imagenet-v2")], Path("data"))
    assert "cifar10-probe-sgd" in listed
    assert "imagenet-v2-probe" not in listed
    for name in ("imagenet-v2-probe-sgd", "cifar10-probe-adam", "cifar-probe-sgd"):
        words = rf"there is no '{name}': linear probes are NAME-probe-sgd"
        with pytest.raises(ValueError, match=words):
            choose_benchmarks([name], Path())
