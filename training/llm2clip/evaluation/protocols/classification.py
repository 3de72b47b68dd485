"""Zero-shot classification: an image belongs to the class whose prompts it is closest to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llm2clip.evaluation.benchmark import BenchmarkError, Measurement
from llm2clip.evaluation.data import ClassificationData
from llm2clip.evaluation.metrics import ROUNDING, QueryRanks
from llm2clip.evaluation.prompts import TEMPLATE_SETS, name_of_templates, prompts
from llm2clip.evaluation.session import Session
from llm2clip.files.atomic import digest_json

KS = (1, 5)
# Images whose scores of all classes are in memory at once.
TILE = 4096
# Embeddings of prompts that are in memory at once.
PROMPTS = 4096


@dataclass(frozen=True)
class ZeroShotClassification:
    """Zero-shot classification with several prompts for each class, as CLIP does it.

    The embeddings of a class's prompts are scaled to unit length, averaged and scaled again; an image has the classes
    in order of their cosines. Classes that score the same count with their expected value. The texts
    are embedded through the session, which stores them: those of 1,000 classes cost an LLM more than the images.

    Args:
        templates: Instead of those of the benchmark.
        classnames: Instead of those of the benchmark, in the order of its labels.
    """

    templates: tuple[str, ...] | None = None
    classnames: tuple[str, ...] | None = None

    @property
    def variant(self) -> str:
        """What is chosen instead of the benchmark's own, in names of files: `paper`, or a checksum of own texts."""
        chosen = name_of_templates(self.templates) if self.templates else ""
        if self.classnames or (chosen and chosen not in TEMPLATE_SETS):
            return f"prompts-{digest_json([self.templates, self.classnames])}"
        return chosen

    def measure(self, session: Session, data: ClassificationData) -> Measurement:
        """Measure top-1, top-5 and the mean over classes of top-1.

        Raises:
            BenchmarkError: `classnames` are not as many as the classes of the data, or the labels are outside them.
        """
        classnames, templates = list(self.classnames or data.classnames), list(self.templates or data.templates)
        if len(classnames) != len(data.classnames):
            raise BenchmarkError(f"{len(classnames):,} names are given for {len(data.classnames):,} classes.")
        texts = prompts(classnames, templates)
        classes = class_embeddings(session, texts, len(templates))
        images = session.embed_images(data.images)
        parts = [
            label_ranks(tile @ classes.T, labels, ROUNDING)
            for tile, labels in zip(images.split(TILE), data.labels.split(TILE), strict=True)
        ]
        ranks = QueryRanks(*(torch.cat(column) for column in zip(*parts, strict=True)))
        protocol = {
            "name": "zero-shot classification",
            "templates": name_of_templates(templates),
            "classnames": f"own ({digest_json(classnames)})" if self.classnames else "of the set",
            "ties": "expected value",
        }
        counts = {"texts": len(texts), **session.count_cut(texts)}
        return measured_ranks(ranks, replace(data, classnames=classnames), protocol, counts)


def class_embeddings(session: Session, texts: Sequence[str], templates: int) -> Tensor:
    """Average the unit rows of the prompts of each class, and scale the means to unit length.

    Args:
        texts: The prompts, `templates` of each class one after another.

    Returns:
        `(classes, width)`.
    """
    size = templates * max(1, PROMPTS // templates)
    means = []
    for start in range(0, len(texts), size):
        embeds = session.embed_texts(texts[start : start + size])
        means.append(embeds.view(-1, templates, embeds.shape[-1]).mean(dim=1))
    return normalize(torch.cat(means), dim=-1)


def label_ranks(scores: Tensor, labels: Tensor, rounding: float = 0.0) -> QueryRanks:
    """Find the rank of the right class of each image.

    Args:
        scores: `(images, classes)`.
        labels: `(images,)` int64.
        rounding: Scores that differ by less are equal.

    Raises:
        BenchmarkError: A label is no class, or a score is NaN.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise BenchmarkError(f"labels are {labels.min()} to {labels.max()}, but there are {scores.shape[1]} classes.")
    if scores.isnan().any():  # which no comparison ranks ahead of anything
        raise BenchmarkError("the scores of classes are NaN: the model or the probe has diverged.")
    right = scores.gather(1, labels[:, None])
    ahead = (scores > right + rounding).sum(dim=1)
    not_behind = (scores >= right - rounding).sum(dim=1)
    return QueryRanks(ahead, not_behind - 1 - ahead, torch.ones_like(ahead))


def measured_ranks(
    ranks: QueryRanks, data: ClassificationData, protocol: Mapping[str, Any], counts: Mapping[str, int]
) -> Measurement:
    """Summarise the ranks of the right classes: top-1, top-5 (of at least five classes) and the mean per class.

    The mean per class is over the classes that have images, as scikit-learn's `balanced_accuracy_score`.
    """
    values = {f"top{k}": ranks.hit_probability(k) for k in KS if k <= len(data.classnames)}
    images = torch.bincount(data.labels, minlength=len(data.classnames))
    hits = torch.zeros(len(images), dtype=torch.float64).index_add_(0, data.labels, values["top1"])
    present = images > 0
    scores = {name: value.mean().item() for name, value in values.items()}
    scores["mean_per_class"] = (hits[present] / images[present]).mean().item()
    first = "mean_per_class" if data.mean_per_class else "top1"
    by_class = {
        name: {"top1": (hits[label] / images[label]).item(), "images": int(images[label])}
        for label, name in enumerate(_distinct(data.classnames))
        if present[label]
    }
    return Measurement(
        protocol={**protocol, "compared": first},
        compared=(first,),
        scores={first: scores[first], **scores},
        values={**values, "mean_per_class": values["top1"]},
        strata={"mean_per_class": data.labels},
        counts={
            "images": len(data.labels),
            "classes": len(data.classnames),
            "classes_with_images": int(present.sum()),
            "tied_images": int(ranks.is_tied.sum()),
            **counts,
        },
        groups={"class": by_class},
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that several classes share, such as the two `missile` of ImageNet."""
    return [f"{name} ({label})" if names.count(name) > 1 else name for label, name in enumerate(names)]
