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
        found = {name: protocol.measure(session, one) for name, one in data.items()}
        compared = [one.scores[one.compared[0]] for one in found.values()]
        values = [one.values["top1"] for one in found.values()]
        sizes = torch.tensor([len(rows) for rows in values])
        counts = ("images", "texts", "truncated_texts", "tied_images", "train_images")
        return Measurement(
            protocol={
                "name": "mean of sets",
                "each": next(iter(found.values())).protocol["name"],
                "sets": {name: one.compared[0] for name, one in found.items()},
            },
            scores={
                "mean": sum(compared) / len(compared),
                "top1": sum(one.scores["top1"] for one in found.values()) / len(found),
            },
            values={"top1": torch.cat(values)},
            strata={"top1": torch.arange(len(found)).repeat_interleave(sizes)},
            counts={
                name: sum(one.counts[name] for one in found.values())
                for name in counts
                if all(name in one.counts for one in found.values())
            },
            groups={"set": {name: one.scores | {"images": len(data[name].labels)} for name, one in found.items()}},
        )
