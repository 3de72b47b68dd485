"""Zero-shot classification: against values by hand, the original code's tensors and scikit-learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch import Tensor
from torch.nn.functional import normalize

from llm2clip.evaluation.benchmark import BenchmarkError, Measurement
from llm2clip.evaluation.data import ClassificationData
from llm2clip.evaluation.metrics import ROUNDING
from llm2clip.evaluation.prompts import prompts
from llm2clip.evaluation.protocols.classification import ZeroShotClassification, class_embeddings, label_ranks
from tests.golden import load_golden
from tests.llm2clip.evaluation.fake_session import FakeSession, numbered_images

TEMPLATES = ["a {c}.", "the {c}", "{c}: a {c}"]


def data_of(labels: list[int] | Tensor, classnames: list[str], **fields: Any) -> ClassificationData:
    return ClassificationData(numbered_images(len(labels)), torch.as_tensor(labels), classnames, **fields)


def table_of(classnames: list[str], templates: list[str], embeds: Tensor) -> dict[str, Tensor]:
    """Give the prompts of each class the embeddings `(classes, templates, width)`."""
    return dict(zip(prompts(classnames, templates), embeds.flatten(0, 1), strict=True))


def measure(images: Any, data: ClassificationData, texts: Any, **options: Any) -> Measurement:
    return ZeroShotClassification(**options).measure(FakeSession(images, texts), data)


def random_set(classes: int = 7, images: int = 200, width: int = 12) -> tuple[Tensor, ClassificationData, Any, Tensor]:
    """Images near their classes, of uneven numbers; one class has none."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(classes, width, generator=generator)
    labels = (torch.rand(images, generator=generator) ** 2 * (classes - 1)).long()
    rows = centres[labels] + 1.2 * torch.randn(images, width, generator=generator)
    embeds = centres[:, None] + torch.randn(classes, len(TEMPLATES), width, generator=generator)
    names = [f"name {label}" for label in range(classes)]
    data = data_of(labels, names, templates=TEMPLATES)
    return rows, data, table_of(names, TEMPLATES, embeds), embeds


def test_prompts_are_scaled_averaged_and_scaled_again() -> None:
    """By hand: long vectors count as much as short ones, so that the first image is a dog's."""
    data = data_of([0, 1], ["dog", "cat"], templates=["{c}", "a {c}"])
    table = {"dog": [0.01, 0.0], "a dog": [0.0, 1.0], "cat": [0.0, 1.0], "a cat": [0.0, 5.0]}
    session = FakeSession([[1.0, 0.9], [0.1, 1.0]], table)
    found = ZeroShotClassification().measure(session, data)
    assert found.scores == {"top1": 1.0, "mean_per_class": 1.0}
    assert session.embedded == [["dog", "a dog", "cat", "a cat"], 2]


def test_classifier_logits_and_accuracies_equal_the_original_code() -> None:
    golden = load_golden("zero_shot_a")
    texts = golden["in/class_template_embeddings"] @ golden["in/text_projection"]
    names, templates = [f"class {row}" for row in range(len(texts))], [f"{{c}} {row}" for row in range(texts.shape[1])]
    session = FakeSession(golden["in/images"], table_of(names, templates, texts))
    classes = class_embeddings(session, prompts(names, templates), len(templates))
    golden.close(classes.T, "out/classifier")
    golden.close(100 * normalize(golden["in/images"], dim=-1) @ classes.T, "out/logits")
    found = ZeroShotClassification().measure(session, data_of(golden["in/target"], names, templates=templates))
    assert {name: found.scores[name] for name in ("top1", "top5")} == golden.meta["metrics"]


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_scores_equal_scikit_learn() -> None:
    images, data, table, embeds = random_set()
    found = measure(images, data, table)
    classes = normalize(normalize(embeds, dim=-1).mean(1), dim=-1)
    logits, labels = (normalize(images) @ classes.T).numpy(), data.labels.numpy()
    assert found.scores["top1"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert found.scores["top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(7)))
    assert found.scores["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    assert found.scores["mean_per_class"] != pytest.approx(found.scores["top1"], abs=0.01)
    assert found.counts["classes"] == 7
    assert found.counts["classes_with_images"] == len(data.labels.unique()) == 6
    by_class = found.groups["class"]
    assert set(by_class) == {f"name {label}" for label in range(6)}
    right = logits.argmax(1)[labels == 2] == 2
    assert by_class["name 2"] == {"top1": pytest.approx(right.mean()), "images": len(right)}
    # What intervals are drawn from: the mean of the means of parts is the score.
    parts, values = found.strata["mean_per_class"], found.values["mean_per_class"]
    means = [values[parts == part].mean().item() for part in parts.unique()]
    assert sum(means) / len(means) == pytest.approx(found.scores["mean_per_class"])
    # The score that is compared comes first and is part of the protocol.
    per_class = measure(images, replace(data, mean_per_class=True), table)
    assert per_class.scores == found.scores
    for measured, first in ((found, "top1"), (per_class, "mean_per_class")):
        assert next(iter(measured.scores)) == measured.protocol["compared"] == first


def test_classes_that_score_the_same_count_with_their_expected_value() -> None:
    """Both `missile`s of ImageNet have the same prompts; no order of classes decides between them."""
    data = data_of([0, 1, 2], ["missile", "missile", "dog"], templates=["{c}"])
    found = measure([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], data, {"missile": [1.0, 0.0], "dog": [0.0, 1.0]})
    assert found.values["top1"].tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert found.counts["tied_images"] == 2
    # Scores that differ in their last bits tie too.
    almost = {"missile": [1.0, 0.0], "rocket": [1.0, 4e-7], "dog": [0.0, 1.0]}
    data.classnames = ["missile", "rocket", "dog"]
    assert measure([[1.0, 0.5], [1.0, 0.5], [0.0, 1.0]], data, almost).counts["tied_images"] == 2
    assert set(found.groups["class"]) == {"missile (0)", "missile (1)", "dog"}
    # The last bits of a matrix product differ between places.
    near = label_ranks(torch.tensor([[0.5, 0.5 + 1e-7, 0.5 - 1e-7, 0.4]]), torch.tensor([0]), ROUNDING)
    assert (near.ahead.item(), near.tied_wrong.item()) == (0, 2)
    assert label_ranks(torch.tensor([[0.5, 0.5 + 1e-7]]), torch.tensor([0])).ahead.item() == 1


def test_broken_labels_scores_and_names_are_refused() -> None:
    data = data_of([0, 2], ["dog", "cat"], templates=["{c}"])
    table = {"dog": [1.0, 0.0], "cat": [0.0, 1.0]}
    with pytest.raises(BenchmarkError, match="labels are 0 to 2, but there are 2 classes"):
        measure([[1.0, 0.0], [0.0, 1.0]], data, table)
    with pytest.raises(BenchmarkError, match="3 names are given for 2 classes"):
        measure([[1.0, 0.0], [0.0, 1.0]], data, table, classnames=("a", "b", "c"))
    with pytest.raises(BenchmarkError, match="NaN"):
        label_ranks(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))
