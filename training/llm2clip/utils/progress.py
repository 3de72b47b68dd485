"""The progress bar of all commands: rich on a terminal, plain log lines at a fixed interval everywhere else."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
# Seconds between two lines where there is no terminal (CI, Slurm), and between two drawings where there is one.
LINE_INTERVAL = 30.0
DRAW_INTERVAL = 0.1
# Where launchers say which process this is: torchrun, and those of MPI. accelerate reads the same variables.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def format_rate(speed: float, unit: str = "it") -> str:
    """Format items per second as `12.3 images/s`, or as `4.5 s/image` below one per second."""
    return f"{speed:,.1f} {_plural(unit)}/s" if speed >= 1 else f"{1 / speed:,.1f} s/{unit}"


def format_seconds(seconds: float) -> str:
    """Format a duration as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _plural(unit: str) -> str:
    return unit if unit == "it" else f"{unit}s"


def is_main_process() -> bool:
    """Whether this process reports progress: the first of its launcher's processes, and no DataLoader worker."""
    rank = next((value for name in RANKS if (value := os.environ.get(name)) is not None), "0")
    return rank == "0" and not multiprocessing.current_process().daemon


class ProgressBar:
    """Show the progress of a piece of work on standard error, and one line when it is done without an error.

    The bar ends with the `with` block. The line of a bar inside another bar or a [`section`] is only of interest to
    the log file.

    Args:
        description: What is being done, such as "Embedding captions".
        total: Number of items, if known.
        unit: Name of an item in the singular, for the rate.
        show: `False` shows nothing, `None` shows a bar on a terminal and nothing elsewhere.
        initial: Number of items that were done before, by a run that this one resumes.
    """

    def __init__(
        self, description: str, total: int | None = None, unit: str = "it", show: bool | None = True, initial: int = 0
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.completed = self.initial = initial
        self.status = ""
        self.started = self._last_line = time.monotonic()
        if is_main_process() and (Console(stderr=True).is_terminal if show is None else show):
            _display.open(self)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.close(done=kind is None)

    def close(self, done: bool) -> None:
        """Remove the bar, where a `with` block is not possible, and log one line if the work is done."""
        if self in _display.tasks:
            _display.close(self)
            if done:
                level = logging.DEBUG if _display.tasks or _sections else logging.INFO
                logger.log(level, "%s: %s", self.description, self.summary())

    def update(self, completed: int | None = None, *, advance: int = 0, status: str | None = None) -> None:
        """Move the bar.

        Args:
            completed: Number of items that are done.
            advance: Number of items that were done since the last call, instead of `completed`.
            status: Short text beside the rate, such as the loss.
        """
        self.completed = self.completed + advance if completed is None else completed
        self.status = self.status if status is None else status
        if _display.tasks.get(self) is not None:
            _display.draw()
        elif self in _display.tasks and time.monotonic() - self._last_line >= LINE_INTERVAL:
            self._last_line = time.monotonic()
            logger.info("%s: %s", self.description, self.text())

    def text(self) -> str:
        """Describe the progress in words, such as `20 of 180, 1.7 s/step, loss 3.21, 4:32 left`."""
        count = f"{self.completed:,}" + (f" of {self.total:,}" if self.total else "")
        rate, left = self.rate(), ""
        if rate and self.total and self.completed < self.total:
            left = f"{format_seconds((self.total - self.completed) / rate)} left"
        return ", ".join(filter(None, [count, format_rate(rate, self.unit) if rate else "", self.status, left]))

    def summary(self) -> str:
        """Describe the finished work, such as `180 steps in 5:12, 1.7 s/step, loss 3.21`."""
        unit = "" if self.unit == "it" else " " + (self.unit if self.completed == 1 else _plural(self.unit))
        rate = self.rate()
        duration = f"{self.completed:,}{unit} in {format_seconds(time.monotonic() - self.started)}"
        return ", ".join(filter(None, [duration, format_rate(rate, self.unit) if rate else "", self.status]))

    def rate(self) -> float:
        """Items per second since the start; 0 if there are none yet."""
        elapsed = time.monotonic() - self.started
        return max(self.completed - self.initial, 0) / elapsed if elapsed else 0.0


progress_bar = ProgressBar  # as a context manager


class _Display:
    """The bars of this process. Bars inside bars are lines of one live display, since a terminal carries only one.

    The display draws during `update`, without a thread: a process that forks a DataLoader's worker while a thread
    draws can leave a locked console to the worker.
    """

    def __init__(self) -> None:
        self.tasks: dict[ProgressBar, TaskID | None] = {}  # of the open bars; None where there is no terminal
        self._progress: Progress | None = None
        self._drawn = 0.0

    def open(self, bar: ProgressBar) -> None:
        console = Console(stderr=True)
        if self._progress is None and console.is_terminal and not console.is_dumb_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
                console=console,
                auto_refresh=False,
                expand=True,
                transient=True,
                redirect_stdout=os.isatty(1),  # a command's result goes where the user sends standard output
            )
            self._progress.start()
        progress = self._progress
        self.tasks[bar] = None if progress is None else progress.add_task(bar.description, total=bar.total, text="")
        self.draw(at_once=True)

    def draw(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._progress is None or (not at_once and now - self._drawn < DRAW_INTERVAL):
            return
        self._drawn = now
        for bar, task in self.tasks.items():
            if task is not None:
                self._progress.update(task, completed=bar.completed, text=bar.text())
        self._progress.refresh()

    def close(self, bar: ProgressBar) -> None:
        task = self.tasks.pop(bar)
        if self._progress is not None and task is not None:
            self._progress.remove_task(task)
            if self.tasks:
                self.draw(at_once=True)
            else:
                self._progress.stop()
                self._progress = None


_display = _Display()
# Depth of the open sections, see `section`.
_sections = 0


def close_bars() -> None:
    """Remove all bars from the terminal, after an error that skipped their end."""
    for bar in reversed([*_display.tasks]):
        _display.close(bar)


def track(
    items: Iterable[ItemT], description: str, total: int | None = None, unit: str = "it", show: bool | None = True
) -> Iterator[ItemT]:
    """Iterate with a [`ProgressBar`] that advances by one for each item."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with ProgressBar(description, total, unit, show) as bar:
        for item in items:
            yield item
            bar.update(advance=1)


def in_section() -> bool:
    """Whether a [`section`] is open, so that lines about parts of its work are for the log file only."""
    return _sections > 0


@contextmanager
def section(title: str) -> Iterator[None]:
    """Log the title of a step and, when it is done, its duration; bars inside it leave no line on the terminal."""
    global _sections
    start = time.monotonic()
    logger.info("%s", title)
    _sections += 1
    try:
        yield
    finally:
        _sections -= 1
    logger.info("    done in %s", format_seconds(time.monotonic() - start))
