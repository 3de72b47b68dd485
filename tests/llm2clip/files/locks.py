"""A lock that another run holds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from llm2clip.files.locks import folder_lock


@contextlib.contextmanager
def another_run(folder: Path) -> Iterator[None]:
    """Hold the lock in another thread, which excludes this one as another process would."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with folder_lock(folder):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    try:
        yield
    finally:
        done.set()
        thread.join()
