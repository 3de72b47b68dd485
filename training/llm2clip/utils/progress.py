"""The progress bar of all commands: rich on a terminal, plain log lines at a fixed interval everywhere else."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
# Seconds between two lines where there is no terminal (CI, Slurm), and between two drawings where there is one.
LINE_INTERVAL = 30.0
DRAW_INTERVAL = 0.1


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


class ProgressBar:
    """The bar of one piece of work; see [`progress_bar`]."""

    def __init__(self, description: str, total: int | None, unit: str, initial: int = 0) -> None:
        self.description, self.total, self.unit, self.initial = description, total, unit, initial
        self.completed = initial
        self.status = ""
        self.started = self._last_line = time.monotonic()

    def update(self, completed: int | None = None, *, advance: int = 0, status: str | None = None) -> None:
        """Move the bar.

        Args:
            completed: Number of items that are done.
            advance: Number of items that were done since the last call, instead of `completed`.
            status: Short text beside the rate, such as the loss.
        """
        self.completed = self.completed + advance if completed is None else completed
        self.status = self.status if status is None else status
        if _display.is_drawn(self):
            _display.draw()
        elif _display.is_open(self) and time.monotonic() - self._last_line >= LINE_INTERVAL:
            self._last_line = time.monotonic()
            logger.info("%s: %s", self.description, self.text())

    def text(self) -> str:
        """Describe the progress in words, such as `20 of 180, 1.7 s/step, loss 3.21, 4:32 left`."""
        count = f"{self.completed:,}" + (f" of {self.total:,}" if self.total else "")
        rate = self.rate()
        left = ""
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


class _Display:
    """The bars of this process. Bars inside bars are lines of one live display, since a terminal carries only one.

    The display draws during `update`, without a thread: a process that forks a DataLoader's worker while a thread
    draws can leave a locked console to the worker.
    """

    def __init__(self) -> None:
        self._open: list[ProgressBar] = []
        self._progress: Progress | None = None
        self._tasks: dict[ProgressBar, int] = {}
        self._drawn = 0.0

    def open(self, bar: ProgressBar) -> None:
        if self._progress is None:
            console = Console(stderr=True)
            if console.is_terminal and not console.is_dumb_terminal:
                self._progress = _new_progress(console)
                self._progress.start()
        self._open.append(bar)
        if self._progress is not None:
            self._tasks[bar] = self._progress.add_task(bar.description, total=bar.total, text=bar.text())
            self.draw(at_once=True)

    def is_open(self, bar: ProgressBar) -> bool:
        return bar in self._open

    def is_drawn(self, bar: ProgressBar) -> bool:
        return bar in self._tasks

    def draw(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._progress is None or (not at_once and now - self._drawn < DRAW_INTERVAL):
            return
        self._drawn = now
        for bar, task in self._tasks.items():
            self._progress.update(task, completed=bar.completed, text=bar.text())  # type: ignore[arg-type]
        self._progress.refresh()

    def close(self, bar: ProgressBar) -> None:
        if bar not in self._open:
            return
        self._open.remove(bar)
        if self._progress is None:
            return
        self._progress.remove_task(self._tasks.pop(bar))  # type: ignore[arg-type]
        if self._open:
            self.draw(at_once=True)
        else:
            self._progress.stop()
            self._progress = None

    def close_all(self) -> None:
        for bar in reversed(self._open.copy()):
            self.close(bar)

    @property
    def depth(self) -> int:
        return len(self._open)


def _new_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        auto_refresh=False,
        expand=True,
        transient=True,
        # A command's result goes where the user sends standard output.
        redirect_stdout=os.isatty(1),
    )


_display = _Display()
# Depth of the open sections, see `section`.
_sections = 0


def close_bars() -> None:
    """Remove all bars from the terminal, after an error that skipped their end."""
    _display.close_all()


def is_main_process() -> bool:
    """Whether this process reports progress: the first of its launcher's processes, and no DataLoader worker."""
    return os.environ.get("RANK", "0") == "0" and not multiprocessing.current_process().daemon


def _shows(show: bool | None) -> bool:
    return is_main_process() and (Console(stderr=True).is_terminal if show is None else show)


def open_bar(description: str, total: int | None = None, unit: str = "it", initial: int = 0) -> ProgressBar:
    """Open a bar that [`close_bar`] closes, where a `with` block is not possible; see [`progress_bar`]."""
    bar = ProgressBar(description, total, unit, initial)
    if is_main_process():
        _display.open(bar)
    return bar


def close_bar(bar: ProgressBar, done: bool = True) -> None:
    """Close a bar, and log one line if the work is done. The line of a bar inside another bar or a
    [`section`] is only of interest to the log file.
    """
    shown = _display.is_open(bar)
    _display.close(bar)
    if shown and done:
        level = logging.DEBUG if _display.depth or _sections else logging.INFO
        logger.log(level, "%s: %s", bar.description, bar.summary())


@contextmanager
def progress_bar(
    description: str, total: int | None = None, unit: str = "it", show: bool | None = True, initial: int = 0
) -> Iterator[ProgressBar]:
    """Show the progress of a piece of work on standard error, and one line when it is done.

    Args:
        description: What is being done, such as "Embedding captions".
        total: Number of items, if known.
        unit: Name of an item in the singular, for the rate.
        show: `False` shows nothing, `None` shows a bar on a terminal and nothing elsewhere.
        initial: Number of items that were done before, by a run that this one resumes.
    """
    bar = (
        open_bar(description, total, unit, initial) if _shows(show) else ProgressBar(description, total, unit, initial)
    )
    done = False
    try:
        yield bar
        done = True
    finally:
        close_bar(bar, done)


def track(
    items: Iterable[ItemT], description: str, total: int | None = None, unit: str = "it", show: bool | None = True
) -> Iterator[ItemT]:
    """Iterate with a [`progress_bar`] that advances by one for each item."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(description, total, unit, show) as bar:
        for item in items:
            yield item
            bar.update(advance=1)


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
