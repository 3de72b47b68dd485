"""One style of progress bar for all commands: rich on a terminal, plain lines at intervals everywhere else."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
# Seconds between two lines where there is no terminal (CI, Slurm).
LINE_INTERVAL = 30.0


class _Rate(ProgressColumn):
    """Items per second, or seconds per item."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(format_rate(speed, task.fields.get("unit", "it")) if speed else "", style="progress.data.speed")


def format_rate(speed: float, unit: str = "it") -> str:
    """Format items per second as `12.3 it/s`, or as `4.5 s/it` below one per second."""
    return f"{speed:.1f} {unit}/s" if speed >= 1 else f"{1 / speed:.1f} s/{unit}"


def format_seconds(seconds: float) -> str:
    """Format a duration as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressBar:
    """The bar of one piece of work; see [`progress_bar`]."""

    def __init__(self, description: str, total: int | None, unit: str, show: bool) -> None:
        self.description, self.total, self.unit = description, total, unit
        console = Console(stderr=True)
        self._lines = show and not console.is_terminal
        self._started = self._last = time.monotonic()
        self._status = ""
        self.completed = 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _Rate(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            TimeElapsedColumn(),
            console=console,
            expand=True,
            transient=True,
            disable=not (show and console.is_terminal),
        )
        self._task = self.progress.add_task(description, total=total, unit=unit, status="")

    def update(self, completed: int | None = None, *, advance: int = 0, status: str | None = None) -> None:
        """Move the bar.

        Args:
            completed: Items that are done.
            advance: Items that were done since the last call, instead of `completed`.
            status: Short text beside the rate, such as the loss.
        """
        self.completed = self.completed + advance if completed is None else completed
        self._status = self._status if status is None else status
        self.progress.update(self._task, completed=self.completed, status=self._status)
        now = time.monotonic()
        if self._lines and now - self._last >= LINE_INTERVAL:
            self._last = now
            logger.info("%s", self._line(now - self._started))

    def _line(self, elapsed: float) -> str:
        parts = [f"{self.description}: {self.completed:,}" + (f" of {self.total:,}" if self.total else "")]
        speed = self.completed / elapsed if elapsed else 0
        if speed:
            parts.append(format_rate(speed, self.unit))
        if self._status:
            parts.append(self._status)
        if speed and self.total and self.completed < self.total:
            parts.append(f"{format_seconds((self.total - self.completed) / speed)} left")
        return ", ".join(parts)

    def finish(self) -> None:
        """Log the one line that stays."""
        elapsed = time.monotonic() - self._started
        rate = f", {format_rate(self.completed / elapsed, self.unit)}" if self.completed and elapsed else ""
        status = f", {self._status}" if self._status else ""
        logger.info("%s: %s in %s%s%s", self.description, f"{self.completed:,}", format_seconds(elapsed), rate, status)


@contextmanager
def progress_bar(
    description: str, total: int | None = None, unit: str = "it", show: bool = True
) -> Iterator[ProgressBar]:
    """Show the progress of a piece of work on standard error, and one line when it is done.

    Args:
        description: What is being done, such as "Embedding captions".
        total: Number of items, if known.
        unit: Name of an item in the rate.
        show: `False` shows nothing.
    """
    bar = ProgressBar(description, total, unit, show)
    with bar.progress:
        yield bar
    if show:
        bar.finish()


def track(
    items: Iterable[ItemT], description: str, total: int | None = None, unit: str = "it", show: bool = True
) -> Iterator[ItemT]:
    """Iterate with a [`progress_bar`] that advances by one for each item."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(description, total, unit, show) as bar:
        for item in items:
            yield item
            bar.update(advance=1)
