"""The end of a command from outside: SIGTERM, which clusters send before they take a machine back, and Ctrl-C."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Exit codes, as shells count them.
TERMINATED = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT


class StoppedError(SystemExit):
    """SIGTERM has ended the run; uncaught, it ends the process with exit code 143 and without a traceback."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


@contextmanager
def on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` for every SIGTERM, in place of the end of the process; forked processes end by it all the same.

    Signals belong to the main thread: in another one, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() == owner:
            action()
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        # None is a handler that was not set by Python.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def stop_now() -> None:
    """Raise [`StoppedError`] in the main thread, as Python raises KeyboardInterrupt; for [`on_sigterm`]."""
    raise StoppedError


def outlive_sigterm(worker: int) -> None:
    """Let a DataLoader's worker ignore one SIGTERM; its `worker_init_fn`.

    Slurm sends the signal to all processes of a job. A worker that ended by it would end the run before its checkpoint
    is saved. By the next one, or by the end of its parent, it ends; see [`worker_init`].
    """

    def handle(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handle)


def worker_init(workers: int) -> Callable[[int], None] | None:
    """Return the `worker_init_fn` of a DataLoader: its workers outlive one SIGTERM, but not this process.

    At its end, a process sends a SIGTERM to its workers and waits for them, so that they have to be killed before.
    """
    if not workers:
        return None
    # The function that was registered last is called first at the end.
    atexit.unregister(_kill_workers)
    atexit.register(_kill_workers)
    return outlive_sigterm


def ignore_ended_workers() -> None:
    """Let the deaths of workers be no error any more, which torch raises wherever the main thread then is."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _kill_workers() -> None:
    ignore_ended_workers()
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
