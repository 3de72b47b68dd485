"""Linear probes: a linear classifier on the features of a frozen vision tower, by three published recipes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.command_line.progress import ProgressBar
from llm2clip.evaluation.benchmark import BenchmarkError, Measurement
from llm2clip.evaluation.data import ClassificationData
from llm2clip.evaluation.protocols.classification import label_ranks, measured_ranks
from llm2clip.evaluation.session import Session

# CLIP's strengths: 8 per decade between 1e-6 and 1e6.
STRENGTHS = [10 ** (-6 + step / 8) for step in range(97)]
# A peak is looked for among every 16th, then at half the distance on both sides, down to neighbours.
FIRST_STEP = 16
HELD_OUT = 5
# Fits of scikit-learn that choose a strength by bisection, with the last one.
FITS = 16
# What it computes in a second on a CPU of some cores, and from how many hours on this is said.
FLOPS, HOURS = 1e11, 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SGDProbe:
    """The probe of LLM2CLIP's paper: SGD in batches of 1,024, learning rate 0.1, momentum 0.9, 50 epochs, no decay.

    The paper states neither schedule nor layer: here the rate is constant, and features are those before the
    projection, as they are. The classifier starts from zero, so that the seed decides the order of the images alone.
    """

    batch_size: int = 1024
    learning_rate: float = 0.1
    momentum: float = 0.9
    epochs: int = 50
    seed: int = 0

    def measure(self, session: Session, data: ClassificationData) -> Measurement:
        """Train on `data.train`, and on `data.validation` if there is one; measure on `data`."""
        features, labels = _train_rows(session, data, "features")
        classify = self._fit(features, labels, len(data.classnames), session)
        logits = classify(session.embed_images(data.images, "features"))
        protocol: dict[str, Any] = {
            "name": "linear probe, SGD of the paper", "features": "before projection", "batch_size": self.batch_size,
            "learning_rate": self.learning_rate, "schedule": "constant", "momentum": self.momentum,
            "weight_decay": 0.0, "epochs": self.epochs, "seed": self.seed,
        }  # fmt: skip
        return measured_ranks(label_ranks(logits, data.labels), data, protocol, {"train_images": len(labels)})

    @torch.enable_grad()
    def _fit(self, features: Tensor, labels: Tensor, classes: int, session: Session) -> Callable[[Tensor], Tensor]:
        device = session.encoder.device
        head = nn.Linear(features.shape[1], classes).to(device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(head.parameters(), self.learning_rate, self.momentum)
        order = torch.Generator().manual_seed(self.seed)
        with ProgressBar("Training the probe", self.epochs, "epoch") as bar:
            for _ in range(self.epochs):
                for rows in torch.randperm(len(features), generator=order).split(self.batch_size):
                    loss = nn.functional.cross_entropy(head(features[rows].to(device)), labels[rows].to(device))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                bar.update()
        return lambda rows: head(rows.to(device)).detach().cpu()


@dataclass(frozen=True)
class LBFGSProbe:
    """The probe of CLIP's paper (appendix A.3): logistic regression by L-BFGS on features before the projection.

    The strength of the L2 regularisation is the one of 97 with the best accuracy on the validation images, found by
    bisection; then the classifier is trained on train and validation images together. Without a validation part, every
    fifth image of each class of the train images is held out for the choice.
    """

    max_iterations: int = 1000

    def measure(self, session: Session, data: ClassificationData) -> Measurement:
        """Choose the strength, train and measure."""
        _warn_of_hours(session, data, self.max_iterations * FITS)
        features, labels = _train_rows(session, data, "features")
        if data.validation is None:
            held_out = _every_nth_of_class(labels)
        else:
            held_out = torch.arange(len(labels)) >= len(labels) - len(data.validation.labels)
        chosen = self.choose(features[~held_out], labels[~held_out], features[held_out], labels[held_out])
        logits = _logistic_regression(
            features, labels, session.embed_images(data.images, "features"), len(data.classnames), STRENGTHS[chosen],
            self.max_iterations,
        )  # fmt: skip
        protocol = {
            "name": "linear probe, L-BFGS of CLIP", "features": "before projection", "iterations": self.max_iterations,
            "strengths": "97 from 1e-6 to 1e6, by bisection",
            "validation": "every 5th train image of a class" if data.validation is None else "of the set",
        }  # fmt: skip
        counts = {"train_images": len(labels), "validation_images": int(held_out.sum()), "strength_step": chosen}
        return measured_ranks(label_ranks(logits, data.labels), data, protocol, counts)

    def choose(self, features: Tensor, labels: Tensor, held_out: Tensor, answers: Tensor) -> int:
        """Return the index in `STRENGTHS` of the best one; of equal ones the one tried first."""
        classes = int(max(labels.max(), answers.max())) + 1
        accuracies: dict[int, float] = {}

        def best_of(steps: list[int]) -> int:
            for step in steps:
                if step not in accuracies and 0 <= step < len(STRENGTHS):
                    logits = _logistic_regression(
                        features, labels, held_out, classes, STRENGTHS[step], self.max_iterations
                    )
                    accuracies[step] = (logits.argmax(dim=1) == answers).double().mean().item()
            return max(accuracies, key=lambda step: accuracies[step])

        peak, distance = best_of(list(range(0, len(STRENGTHS), FIRST_STEP))), FIRST_STEP
        while distance > 1:
            distance //= 2
            peak = best_of([peak - distance, peak + distance])
        return peak


@dataclass(frozen=True)
class FixedLBFGSProbe:
    """The probe of OpenAI's README: scikit-learn's logistic regression with C = 0.316 on projected features.

    The features are those after the projection, not scaled to unit length.
    """

    strength: float = 0.316
    max_iterations: int = 1000

    def measure(self, session: Session, data: ClassificationData) -> Measurement:
        """Train and measure."""
        _warn_of_hours(session, data, self.max_iterations)
        features, labels = _train_rows(session, data, "projected")
        images, classes = session.embed_images(data.images, "projected"), len(data.classnames)
        logits = _logistic_regression(features, labels, images, classes, self.strength, self.max_iterations)
        protocol = {
            "name": "linear probe, L-BFGS of OpenAI's README", "features": "projected", "C": self.strength,
            "iterations": self.max_iterations,
        }  # fmt: skip
        return measured_ranks(label_ranks(logits, data.labels), data, protocol, {"train_images": len(labels)})


def _warn_of_hours(session: Session, data: ClassificationData, iterations: int) -> None:
    """Say how long scikit-learn may take, before images are embedded for it."""
    images = sum(len(part.labels) for part in (data.train, data.validation) if part is not None)
    classes = len(data.classnames)
    # Logits and their gradient, each a multiplication and an addition for each value.
    hours = 4 * iterations * images * classes * session.encoder.width / FLOPS / 3600
    if hours > HOURS:
        logger.warning(
            "this linear probe fits %s images of %s classes with scikit-learn on the CPU: up to %s hours. The probe "
            "by SGD (-probe-sgd) takes minutes, on any device.",
            f"{images:,}", f"{classes:,}", f"{hours:,.0f}",
        )  # fmt: skip


def _train_rows(session: Session, data: ClassificationData, kind: str) -> tuple[Tensor, Tensor]:
    """Return the features and labels of the train images, and then of the validation images if there are some.

    Raises:
        BenchmarkError: There are no train images, or only of one class.
    """
    if data.train is None or len(data.train.labels.unique()) < 2:
        raise BenchmarkError("a linear probe needs train images of at least two classes.")
    parts = [part for part in (data.train, data.validation) if part is not None]
    features = torch.cat([session.embed_images(part.images, kind) for part in parts])
    return features, torch.cat([part.labels for part in parts])


def _every_nth_of_class(labels: Tensor) -> Tensor:
    """Hold out every fifth row of each class: `(rows,)` bool."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        held_out[(labels == label).nonzero()[HELD_OUT - 1 :: HELD_OUT, 0]] = True
    if not held_out.any():
        raise BenchmarkError(f"no class has {HELD_OUT} train images, of which one could be held out for validation.")
    return held_out


def _logistic_regression(
    features: Tensor, labels: Tensor, images: Tensor, classes: int, strength: float, iterations: int
) -> Tensor:
    """Fit scikit-learn's logistic regression and return the logits of other images, `(images, classes)`.

    Args:
        strength: scikit-learn's C, the inverse of the penalty's factor.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("this linear probe needs scikit-learn: pip install 'llm2clip[evaluation]'.") from error
    model = LogisticRegression(C=strength, max_iter=iterations, random_state=0)
    with warnings.catch_warnings():
        # The recipe ends after its iterations, converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features.numpy(), labels.numpy())
    decisions = torch.from_numpy(model.decision_function(images.numpy())).float()
    if decisions.ndim == 1:  # of two classes, the logit of the second
        decisions = torch.stack([torch.zeros_like(decisions), decisions], dim=1)
    logits = torch.full((len(images), classes), -torch.inf)
    logits[:, torch.from_numpy(model.classes_)] = decisions
    return logits
