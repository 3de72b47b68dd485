"""The progress bar of all commands: tqdm on a terminal, plain log lines at a fixed interval everywhere else."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
# Seconds between two lines where there is no terminal (CI, Slurm), and between two drawings where there is one.
LINE_INTERVAL, DRAW_INTERVAL = 30.0, 0.1
DONE = "{desc}: {n_fmt} {items} in {elapsed}, {rate_fmt}{postfix}"
# Where launchers say which process this is: torchrun, and those of MPI. accelerate reads the same variables.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def is_main_process() -> bool:
    """Tell whether this process reports progress: the first of its launcher's processes, and no DataLoader worker."""
    rank = next((value for name in RANKS if (value := os.environ.get(name)) is not None), "0")
    return rank == "0" and not multiprocessing.current_process().daemon


class ProgressBar(tqdm):
    """Show the progress of a piece of work on standard error, and one line when it is done without an error.

    The bar ends with the `with` block. The line of a bar inside another bar or a [`section`] goes to the log file
    only.

    Args:
        description: What is being done, such as "Embedding captions".
        total: Number of items, if known.
        unit: Name of an item in the singular, for the rate.
        show: `False` shows nothing, `None` shows a bar on a terminal and nothing elsewhere.
    """

    # No thread that draws: a DataLoader's worker that is forked meanwhile would keep its lock.
    monitor_interval = 0

    def __init__(self, description: str, total: int | None = None, unit: str = "it", show: bool | None = True) -> None:
        self.is_drawn = sys.stderr.isatty()
        is_shown = is_main_process() and (self.is_drawn if show is None else show)
        if is_shown:
            _open.add(self)
        # Where there is no terminal, nothing is drawn: `update` logs.
        super().__init__(
            *(None, description, total),
            unit=unit,
            disable=not is_shown,
            leave=False,
            file=sys.stderr if self.is_drawn else io.StringIO(),
            mininterval=DRAW_INTERVAL if self.is_drawn else LINE_INTERVAL,
            miniters=1,
            dynamic_ncols=self.is_drawn,
            ncols=0,
        )

    def update(self, n: float | None = 1) -> bool | None:
        """Move the bar by `n` items; returns whether that was shown."""
        is_shown = super().update(n)
        if is_shown and not self.is_drawn:
            logger.info("%s", str(self))
        return is_shown

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.close(done=kind is None)

    def close(self, done: bool = False) -> None:
        """Remove the bar, where a `with` block is not possible, and log one line if the work is `done`."""
        if self not in _open:
            return
        super().close()
        _open.discard(self)
        if done:
            items = self.unit if self.n == 1 or self.unit == "it" else f"{self.unit}s"
            # Without a rate, it is that of the whole work.
            fields = {**self.format_dict, "rate": None, "items": items, "ncols": None, "bar_format": DONE}
            text = self.format_meter(**fields).replace(",  ", ", ")  # the rate is padded
            logger.log(logging.DEBUG if _open or _sections else logging.INFO, "%s", text)


# tqdm's own lock is shared with forked processes: one that is killed would keep it.
ProgressBar.set_lock(threading.RLock())
_open: set[ProgressBar] = set()
# Depth of the open sections, see `section`.
_sections = 0


def close_bars() -> None:
    """Remove all bars from the terminal, after an error that skipped their end."""
    for bar in [*_open]:
        bar.close()


def track(items: Iterable[ItemT], description: str, unit: str) -> Iterator[ItemT]:
    """Iterate with a [`ProgressBar`] that advances by one for each item."""
    with ProgressBar(description, len(items) if isinstance(items, Sized) else None, unit) as bar:
        for item in items:
            yield item
            bar.update()


def in_section() -> bool:
    """Tell whether a [`section`] is open, within which lines go to the log file only."""
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
    logger.info("    done in %s", tqdm.format_interval(time.monotonic() - start))
