"""What a run reads besides its settings, recorded in its checkpoints: whether a resumed run has the same."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sized
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from llm2clip.data.sampling import EpochDataset
from llm2clip.data.streams import SampleStream
from llm2clip.utils.files import read_json, write_json
from llm2clip.utils.processes import on_main_process

if TYPE_CHECKING:
    from llm2clip.trainers.base_trainer import StageTrainer

logger = logging.getLogger(__name__)

INPUTS_FILE = "inputs.json"
ROWS, CONTENT = "rows of the training data", "content of the training data"
# Values of each weight in a digest: another training run changes every one of them.
SAMPLED = 64


class RunInputs:
    """The training data and the frozen weights of a run; they have to stay the same until it ends.

    Of other data sets than this package's, only the number of rows is compared.
    """

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    @cached_property
    def values(self) -> dict[str, Any]:
        """What is compared, by its name in words; in the main process only."""
        data: Any = self.trainer.train_dataset
        values: dict[str, Any] = {}
        if isinstance(data, Sized) and not isinstance(data, IterableDataset):
            values[ROWS] = len(data)
        if isinstance(data, EpochDataset | SampleStream):
            values[CONTENT] = data.content_digest()
        return values | self.trainer.frozen_inputs()

    def compare(self, checkpoint: str | None) -> None:
        """Compare with what a checkpoint records, in all processes.

        Raises:
            ValueError: Something differs, and `resume_anyway` is off.
        """
        on_main_process(partial(self._compare, checkpoint))

    def _compare(self, checkpoint: str | None) -> None:
        now = self.values
        if checkpoint is None:
            return
        path = Path(checkpoint) / INPUTS_FILE
        if not path.is_file():
            logger.warning("%s is missing: the data of the resumed run cannot be compared with these.", path)
            return
        old = read_json(path)
        changed = [name for name in now if name in old and old[name] != now[name]]
        lines = [f"{name}: {old[name]} -> {now[name]}" for name in changed]
        for line in lines:
            logger.info("changed since the run was started: %s", line)
        if changed and not self.trainer.args.resume_anyway:
            raise ValueError(
                f"the run of {checkpoint} had other inputs ({'; '.join(lines)}), so that it would not end as an "
                "uninterrupted one; restore them, or add --resume-anyway (in Python, resume_anyway=True)."
            )

    def save(self, checkpoint: Path) -> None:
        """Record them in a checkpoint; called in the main process."""
        write_json(checkpoint / INPUTS_FILE, self.values)


def sampled_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash some values of each of the named weights."""
    digest = hashlib.sha256()
    for name, weight in weights:
        values = weight.detach().flatten()
        # In whole numbers: float32 has no place for the last of 28 million values.
        count = min(SAMPLED, len(values))
        places = torch.arange(count, device=values.device) * (len(values) - 1) // max(1, count - 1)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values[places].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
