"""The mean over several sets of classification, each measured by its own rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llm2clip.evaluation.benchmark import BenchmarkError, Measurement
from llm2clip.evaluation.data import ClassificationData
from llm2clip.evaluation.protocols import open_protocol
from llm2clip.evaluation.session import Session


@dataclass(frozen=True)
class MeanOfSets:
    """The mean of the scores by which sets of classification are compared: top-1, or the mean per class of some.

    Args:
        each: Id of the protocol of each set.
    """

    each: str = "zero-shot-classification"

    def measure(self, session: Session, data: Mapping[str, ClassificationData]) -> Measurement:
        """Measure all sets; groups are the sets. Only the mean of top-1 has an interval, which is over images.

        Raises:
            BenchmarkError: There is no set, or one cannot be measured.
        """
        if not data:
            raise BenchmarkError("there is no set to average.")
        protocol = open_protocol(self.each, {})
        measured = {name: protocol.measure(session, part) for name, part in data.items()}
        compared = [part.scores[part.compared[0]] for part in measured.values()]
        values = [part.values["top1"] for part in measured.values()]
        sizes = torch.tensor([len(rows) for rows in values])
        counts = ("images", "texts", "truncated_texts", "tied_images", "train_images")
        return Measurement(
            protocol={
                "name": "mean of sets",
                "each": next(iter(measured.values())).protocol["name"],
                "sets": {name: part.compared[0] for name, part in measured.items()},
            },
            scores={
                "mean": sum(compared) / len(compared),
                "top1": sum(part.scores["top1"] for part in measured.values()) / len(measured),
            },
            values={"top1": torch.cat(values)},
            strata={"top1": torch.arange(len(measured)).repeat_interleave(sizes)},
            counts={
                name: sum(part.counts[name] for part in measured.values())
                for name in counts
                if all(name in part.counts for part in measured.values())
            },
            groups={
                "set": {name: part.scores | {"images": len(data[name].labels)} for name, part in measured.items()}
            },
        )
