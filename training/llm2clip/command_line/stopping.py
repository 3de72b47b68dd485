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


def stop_behind(error: BaseException) -> KeyboardInterrupt | StoppedError | None:
    """Return the Ctrl-C or SIGTERM that `error` was raised from or after, if any.

    Ctrl-C reaches the worker processes too, and torch raises a RuntimeError as soon as one of them has ended: while
    KeyboardInterrupt is on its way up, that error takes its place.
    """
    seen: set[int] = set()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if isinstance(link, KeyboardInterrupt | StoppedError):
            return link
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            links += [link.__cause__, link.__context__]
    return None


def ignore_ended_workers() -> None:
    """Ignore the end of worker processes from now on, which torch raises as an error wherever the main thread is."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
