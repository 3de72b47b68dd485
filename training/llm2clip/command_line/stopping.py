"""The end of a command from outside: SIGTERM, which clusters send before they take a machine back, and Ctrl-C."""

from __future__ import annotations

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
    """Call `action` for every SIGTERM instead of ending the process; forked processes still end.

    Only the main thread can handle signals: in another one, nothing changes.
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


def ignore_ended_workers() -> None:
    """Ignore the end of worker processes from now on, which torch raises as an error wherever the main thread is."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
