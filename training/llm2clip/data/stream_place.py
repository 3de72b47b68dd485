"""Where a run is in its streams: how its readers shared the rows, since which step. A checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Layout:
    """How the readers of a run share its rows; a reader is a DataLoader worker of a process.

    Attributes:
        world_size, workers: Number of processes, and of DataLoader workers of each, at least 1.
        batch_size: Rows in a batch of a process.
        accumulation: Batches of a process in an optimizer step.
        buffers: Rows in the shuffle buffer of a reader, for each source.
        step: The optimizer step at which it began.
    """

    world_size: int
    workers: int = 1
    batch_size: int = 1
    accumulation: int = 1
    buffers: Sequence[int] = (0,)
    step: int = 0

    @property
    def num_readers(self) -> int:
        return self.world_size * self.workers

    def batches_of(self, reader: int, steps: int) -> int:
        """Return how many batches a reader has yielded after so many optimizer steps; workers take turns."""
        worker = reader // self.world_size
        return (steps * self.accumulation - worker + self.workers - 1) // self.workers

    def rows_of(self, reader: int, steps: int) -> int:
        """Return how many rows a reader has yielded after so many optimizer steps."""
        return self.batches_of(reader, steps) * self.batch_size


@dataclass(frozen=True)
class Place:
    """A place in the streams of a run: the layouts since its start, and the optimizer steps that it has done."""

    layouts: tuple[Layout, ...] = field(default_factory=tuple)
    step: int = 0

    def at(self, step: int) -> Place:
        """Return the place after so many steps with the last layout."""
        return replace(self, step=step)

    def steps(self) -> list[int]:
        """Return how many steps were done with each layout."""
        ends = [*(layout.step for layout in self.layouts[1:]), self.step]
        return [end - layout.step for layout, end in zip(self.layouts, ends, strict=True)]

    def with_layout(self, layout: Layout) -> Place:
        """Return the place from which a run goes on with a layout: with the last one, if its readers are as many."""
        layout = replace(layout, step=self.step)
        if self.layouts:
            last = self.layouts[-1]
            if replace(layout, step=last.step, buffers=last.buffers) == last:
                return self
            if last.step == self.step:
                return replace(self, layouts=(*self.layouts[:-1], layout))
        return replace(self, layouts=(*self.layouts, layout))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"step": self.step, "layouts": [asdict(layout) for layout in self.layouts]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Place:
        """Build a place from the values of [`Place.to_json`]."""
        layouts = (Layout(**{**fields, "buffers": tuple(fields["buffers"])}) for fields in values["layouts"])
        return cls(tuple(layouts), values["step"])
