"""Composition: whether a model tells apart captions, or images, that differ little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm2clip.evaluation.benchmark import BenchmarkError, Measurement
from llm2clip.evaluation.data import HardNegativeData, PairData
from llm2clip.evaluation.metrics import ROUNDING
from llm2clip.evaluation.session import Session

TIES = "wrong"


@dataclass(frozen=True)
class PairScores:
    """Text, image and group score of Winoground.

    A pair has its text score if each image prefers its own caption, its image score if each caption prefers its own
    image, and its group score if it has both. Equal similarities are wrong.
    """

    def measure(self, session: Session, data: PairData) -> Measurement:
        """Measure all pairs; groups are the kinds.

        Raises:
            BenchmarkError: There is no pair.
        """
        of_texts, of_images = _margins(session.embed_images(data.images), session.embed_texts(data.texts), data)
        margins = torch.cat([of_texts, of_images], dim=1)
        values = {
            "group_score": _all_won(margins),
            "text_score": _all_won(of_texts),
            "image_score": _all_won(of_images),
        }
        return Measurement(
            protocol={"name": "pair scores", "ties": TIES},
            compared=("text_score", "image_score", "group_score"),
            values=values,
            counts=_counts(session, data.texts, margins) | {"pairs": len(data.kinds)},
            groups={"kind": _by_kind(values, data.kinds)},
        )


@dataclass(frozen=True)
class ImageChoice:
    """MMVP-VLM: both captions of a pair must prefer their own image; the accuracy is the mean of the kinds.

    Args:
        prompt: What the statement is put into, at `{}`.
    """

    prompt: str = "a photo of {}"

    def measure(self, session: Session, data: PairData) -> Measurement:
        """Measure all pairs.

        Raises:
            BenchmarkError: There is no pair.
        """
        texts = [self.prompt.replace("{}", text) for text in data.texts]
        _, margins = _margins(session.embed_images(data.images), session.embed_texts(texts), data)
        values = {"accuracy": _all_won(margins)}
        kinds = _by_kind(values, data.kinds)
        return Measurement(
            protocol={"name": "image choice", "prompt": self.prompt, "ties": TIES, "mean": "of kinds"},
            scores={"accuracy": _mean(kinds)},
            values=values,
            strata={"accuracy": _parts(data.kinds)},
            counts=_counts(session, texts, margins) | {"pairs": len(data.kinds)},
            groups={"kind": kinds},
        )


@dataclass(frozen=True)
class CaptionChoice:
    """SugarCrepe: the right caption must score higher than the wrong one. Equal similarities are wrong.

    The accuracy is the mean of the kinds; there is also one for the kinds of each first word (`add`, `replace`,
    `swap`), the mean of these.
    """

    def measure(self, session: Session, data: HardNegativeData) -> Measurement:
        """Measure all choices.

        Raises:
            BenchmarkError: There is no choice.
        """
        if not data.right:
            raise BenchmarkError("there is no choice.")
        images = session.embed_images(data.images)[data.owners].double()
        texts = [*data.right, *data.wrong]
        right, wrong = session.embed_texts(texts).double().chunk(2)
        margins = ((images * right).sum(dim=1) - (images * wrong).sum(dim=1))[:, None]
        won = _all_won(margins)
        rows_of = {"accuracy": list(range(len(data.kinds)))}
        for row, kind in enumerate(data.kinds):
            rows_of.setdefault(f"{kind.split('_')[0]}_accuracy", []).append(row)
        kinds_of = {name: [data.kinds[row] for row in rows] for name, rows in rows_of.items()}
        values = {name: won[rows] for name, rows in rows_of.items()}
        kinds = {name: _by_kind({"accuracy": values[name]}, kinds_of[name]) for name in rows_of}
        return Measurement(
            protocol={"name": "caption choice", "ties": TIES, "mean": "of kinds"},
            scores={name: _mean(kinds[name]) for name in rows_of},
            values=values,
            strata={name: _parts(kinds_of[name]) for name in rows_of},
            clusters={name: data.owners[rows] for name, rows in rows_of.items()},
            counts=_counts(session, texts, margins) | {"images": len(data.images), "choices": len(data.kinds)},
            groups={"kind": kinds["accuracy"]},
        )


def _margins(images: Tensor, captions: Tensor, data: PairData) -> tuple[Tensor, Tensor]:
    """Compute by how much the own caption of each image, and the own image of each caption, scores higher.

    Args:
        images, captions: Unit rows, `(2 * pairs, width)`.

    Returns:
        `(pairs, 2)` float64 each.
    """
    if not data.kinds:
        raise BenchmarkError("there is no pair.")
    images, captions = (rows.double().view(len(data.kinds), 2, -1) for rows in (images, captions))
    scores = captions @ images.transpose(1, 2)
    own_scores = scores.diagonal(dim1=1, dim2=2)
    other_caption = torch.stack([scores[:, 1, 0], scores[:, 0, 1]], dim=1)
    other_image = torch.stack([scores[:, 0, 1], scores[:, 1, 0]], dim=1)
    return own_scores - other_caption, own_scores - other_image


def _all_won(margins: Tensor) -> Tensor:
    """Tell whether all comparisons of a row are won, `(rows,)` float64 of 0 and 1; equal similarities are lost."""
    return (margins > ROUNDING).all(dim=1).double()


def _counts(session: Session, texts: Sequence[str], margins: Tensor) -> dict[str, int]:
    return {
        "texts": len(texts),
        **session.count_cut(texts),
        "tied_queries": int((margins.abs() <= ROUNDING).any(dim=1).sum()),
    }


def _by_kind(values: dict[str, Tensor], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Average values over the rows of each kind, in order of appearance."""
    means = {}
    for kind in dict.fromkeys(kinds):
        rows = [row for row, other in enumerate(kinds) if other == kind]
        means[kind] = {name: value[rows].mean().item() for name, value in values.items()} | {"queries": len(rows)}
    return means


def _mean(kinds: dict[str, dict[str, float]]) -> float:
    return sum(scores["accuracy"] for scores in kinds.values()) / len(kinds)


def _parts(kinds: Sequence[str]) -> Tensor:
    """Number the kinds in order of appearance, `(rows,)` int64."""
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return torch.tensor([numbers[kind] for kind in kinds])
