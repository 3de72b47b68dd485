"""The linear probe: a linear classifier on the features of a frozen vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm2clip.command_line.progress import ProgressBar
from llm2clip.evaluation.benchmark import BenchmarkError, Measurement
from llm2clip.evaluation.data import ClassificationData
from llm2clip.evaluation.protocols.classification import label_ranks, measured_ranks
from llm2clip.evaluation.session import FEATURES, Session

# The recipe of LLM2CLIP's paper.
BATCH, RATE, MOMENTUM, EPOCHS = 1024, 0.1, 0.9, 50
SEED = 0


@dataclass(frozen=True)
class LinearProbe:
    """The probe of LLM2CLIP's paper: SGD in batches of 1,024, learning rate 0.1, momentum 0.9, 50 epochs, no decay.

    The paper states neither schedule nor layer: here the rate is constant, and features are those before the
    projection, as they are. The classifier starts from zero, so that the seed decides the order of the images alone.
    """

    def measure(self, session: Session, data: ClassificationData) -> Measurement:
        """Train on `data.train`, and measure on `data`.

        Raises:
            BenchmarkError: There are no train images, or only of one class; or the training diverges.
        """
        if data.train is None or len(data.train.labels.unique()) < 2:
            raise BenchmarkError("a linear probe needs train images of at least two classes.")
        features = session.embed_images(data.train.images, FEATURES)
        head = fit(features, data.train.labels, len(data.classnames), session.encoder.device)
        logits = head(session.embed_images(data.images, FEATURES).to(session.encoder.device)).detach().cpu()
        protocol = {
            "name": "linear probe, SGD of the paper", "features": "before projection", "batch_size": BATCH,
            "learning_rate": RATE, "schedule": "constant", "momentum": MOMENTUM, "weight_decay": 0.0,
            "epochs": EPOCHS, "seed": SEED,
        }  # fmt: skip
        counts = {"train_images": len(data.train.labels)}
        return measured_ranks(label_ranks(logits, data.labels), data, protocol, counts)


@torch.enable_grad()
def fit(features: Tensor, labels: Tensor, classes: int, device: torch.device) -> nn.Linear:
    """Train a linear classifier on a device, to which a batch at a time is moved."""
    head = nn.Linear(features.shape[1], classes).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), RATE, MOMENTUM)
    order = torch.Generator().manual_seed(SEED)
    with ProgressBar("Training the probe", EPOCHS, "epoch") as bar:
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(features), generator=order).split(BATCH):
                loss = nn.functional.cross_entropy(head(features[rows].to(device)), labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            bar.update()
    return head
