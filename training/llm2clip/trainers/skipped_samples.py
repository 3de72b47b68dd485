"""How many samples a run has skipped, across resumes."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerState

from llm2clip.data import SkipLog
from llm2clip.trainers.run_totals import RunCount


class SkippedSamples(RunCount):
    """Counts the distinct samples in the logs of all processes, from the first step of a run to the present one.

    Checkpoints contain the sizes of the logs. A resumed run cuts off what was added after its checkpoint, and one that
    starts anew what another run has left.
    """

    def __init__(self, log: SkipLog | None) -> None:
        self.skip_log = log
        self._keys: set[str] = set()
        self._sizes: list[int] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.skip_log is None:
            return
        sizes = self.stored(state).get("sizes", [])
        self._keys.clear()
        self.skip_log.rewind(sizes[args.process_index] if args.process_index < len(sizes) else 0)

    def add(self, skipped: list[tuple[str, str]]) -> None:
        """List samples (key and reason) that this process has skipped."""
        if skipped and self.skip_log is not None:
            self.skip_log.add(skipped)

    def count(self) -> int:
        """Count those of all processes, which all have to call this."""
        self._keys.update(gather_object(self.skip_log.take_new() if self.skip_log is not None else []))
        return len(self._keys)

    def gather(self) -> None:
        """Prepare [`state`], in all processes."""
        self._sizes = gather_object([self.skip_log.size if self.skip_log is not None else 0])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint contains, after [`gather`]."""
        return {"args": {}, "attributes": {"sizes": self._sizes}}
