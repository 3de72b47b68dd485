"""Linear probes: each recipe against scikit-learn or a direct loop, with its choice of strength."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.benchmarks import all_benchmarks, choose_benchmarks
from llm2clip.evaluation.benchmarks.listing import list_benchmarks
from llm2clip.evaluation.data import BenchmarkImages, ClassificationData
from llm2clip.evaluation.protocols import linear_probe
from llm2clip.evaluation.protocols.linear_probe import STRENGTHS, FixedLBFGSProbe, LBFGSProbe, SGDProbe
from tests.llm2clip.evaluation.fake_session import FakeSession

CLASSES, WIDTH = 4, 6


def make(**sizes: int) -> tuple[Any, dict[str, Tensor], FakeSession]:
    """A set of parts of some sizes, their features, and a session that knows them; projected ones are others."""
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
    data = replace(parts["test"], train=parts.get("train"), validation=parts.get("validation"))
    return data, rows, FakeSession(tables[1], {"": [1.0]}, features=tables[0])


def hits_of(model: Any, rows: Tensor, labels: Tensor) -> list[bool]:
    return (model.predict(rows.numpy()) == labels.numpy()).tolist()


def test_sgd_is_that_of_the_paper() -> None:
    """A direct loop: batches of 1,024 of 1,500 images, constant rate 0.1, momentum 0.9, 50 epochs, raw features."""
    data, rows, session = make(test=200, train=1500)
    found = SGDProbe().measure(session, data)
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


def test_openai_readme_is_scikit_learn_with_its_constant_on_projected_features() -> None:
    data, rows, session = make(test=100, train=200)
    found = FixedLBFGSProbe().measure(session, data)
    train, test = (rows[name][:, :4].flip(1) for name in ("train", "test"))
    model = LogisticRegression(random_state=0, C=0.316, max_iter=1000).fit(train.numpy(), data.train.labels.numpy())
    assert found.values["top1"].tolist() == [float(hit) for hit in hits_of(model, test, data.labels)]
    assert found.scores["top1"] < 1
    assert found.protocol["C"] == 0.316


def test_lbfgs_chooses_by_the_validation_part_and_trains_on_both() -> None:
    data, rows, session = make(test=120, train=80, validation=60)
    found = LBFGSProbe().measure(session, data)
    chosen = STRENGTHS[found.counts["strength_step"]]

    def fit(strength: float, names: list[str]) -> Any:
        features = torch.cat([rows[name] for name in names]).numpy()
        labels = torch.cat([getattr(data, name).labels for name in names]).numpy()
        return LogisticRegression(C=strength, max_iter=1000, random_state=0).fit(features, labels)

    model = fit(chosen, ["train", "validation"])
    assert found.values["top1"].tolist() == [float(hit) for hit in hits_of(model, rows["test"], data.labels)]
    # No other strength of the first round is better on the validation part.
    accuracies = {
        strength: np.mean(hits_of(fit(strength, ["train"]), rows["validation"], data.validation.labels))
        for strength in [*STRENGTHS[::16], chosen]
    }
    assert accuracies[chosen] == max(accuracies.values())
    assert found.counts["validation_images"] == 60
    assert found.protocol["validation"] == "of the set"


def test_strengths_are_clips_and_the_peak_is_found_by_bisection(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 per decade between 1e-6 and 1e6; a peak at step 37 is found in 15 fits, each of another strength."""
    assert STRENGTHS[::16] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert len(STRENGTHS) == 97
    tried: list[int] = []

    def fit(features: Tensor, labels: Tensor, images: Tensor, classes: int, strength: float, _: int) -> Tensor:
        tried.append(STRENGTHS.index(strength))
        wrong = abs(tried[-1] - 37)
        return torch.stack([torch.where(torch.arange(100) < wrong, -1.0, 1.0), torch.zeros(100)], dim=1)

    monkeypatch.setattr(linear_probe, "_logistic_regression", fit)
    zeros = torch.zeros(100, dtype=torch.int64)
    assert LBFGSProbe().choose(torch.zeros(100, 1), torch.ones(100).long(), torch.zeros(100, 1), zeros) == 37
    assert tried == [*range(0, 97, 16), 24, 40, 36, 44, 34, 38, 35, 37]


def test_days_of_scikit_learn_are_said_before_images_are_embedded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def embedded(*_: Any) -> None:
        raise KeyboardInterrupt

    data, _, session = make(test=20, train=40)
    for probe in (SGDProbe(), LBFGSProbe(), FixedLBFGSProbe()):
        probe.measure(session, data)
    assert "hours" not in caplog.text
    assert data.train is not None
    labels = torch.arange(1_281_167) % 1000
    large = replace(data, train=replace(data.train, labels=labels), classnames=[f"{name}" for name in range(1000)])
    session.encoder.width = 768
    monkeypatch.setattr(FakeSession, "embed_images", embedded)
    for probe, words in (
        (SGDProbe(), ""),
        (FixedLBFGSProbe(), "fits 1,281,167 images of 1,000 classes with scikit-learn on the CPU: up to 11 hours"),
        (LBFGSProbe(), "up to 175 hours"),
    ):
        caplog.clear()
        with pytest.raises(KeyboardInterrupt):
            probe.measure(session, large)
        assert words in caplog.text
        assert bool(words) == bool(caplog.text)


def test_without_a_validation_part_every_fifth_image_of_a_class_is_held_out() -> None:
    data, _, session = make(test=40, train=60)
    found = LBFGSProbe().measure(session, data)
    assert (found.counts["train_images"], found.counts["validation_images"]) == (60, 12)
    assert found.protocol["validation"] == "every 5th train image of a class"
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 5)
    assert linear_probe._every_nth_of_class(labels).nonzero()[:, 0].tolist() == [4, 9, 18]
    with pytest.raises(BenchmarkError, match="no class has 5 train images"):
        linear_probe._every_nth_of_class(torch.tensor([0, 0, 1, 1]))


def test_a_set_without_train_images_and_a_diverged_probe_are_refused() -> None:
    data, _, session = make(test=8, train=8)
    with pytest.raises(BenchmarkError, match="needs train images of at least two classes"):
        SGDProbe().measure(session, replace(data, train=None))
    table = session.encoder.features
    session.encoder.features = {content: torch.as_tensor(row) * 1e30 for content, row in table.items()}
    with pytest.raises(BenchmarkError, match="has diverged"):
        SGDProbe().measure(session, data)


def test_probes_are_chosen_by_names_of_their_own() -> None:
    names = ["cifar10-probe-sgd", "fashion-mnist-probe-openai"]
    found = choose_benchmarks(names, Path())
    assert [benchmark.name for benchmark in found] == names
    assert found[0].counts == all_benchmarks()["cifar10"].counts
    assert "**/train-*.parquet" in found[0].needs
    listed = list_benchmarks([all_benchmarks()[name] for name in ("cifar10", "imagenet-v2")], Path("data"))
    assert "cifar10-probe-sgd cifar10-probe-lbfgs cifar10-probe-openai" in listed
    assert "imagenet-v2-probe" not in listed
    for name in ("imagenet-v2-probe-sgd", "cifar10-probe-adam", "cifar-probe-sgd"):
        words = rf"there is no '{name}': linear probes are NAME-probe-sgd\|lbfgs\|openai"
        with pytest.raises(ValueError, match=words):
            choose_benchmarks([name], Path())
