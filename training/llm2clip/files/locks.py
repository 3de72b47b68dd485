"""A lock on a folder, so that two runs do not write into it at the same time."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock, Timeout

from llm2clip.command_line.progress import is_main_process

logger = logging.getLogger(__name__)
RunT = TypeVar("RunT", bound=Callable[..., Any])

LOCK = ".lock"
# Errors of network file systems that have no locks.
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# Seconds to wait for the DataLoader workers of a killed run, which notice its end after a few seconds.
PATIENCE = 15.0
# Seconds to wait for another run that computes what this one needs: a week; with several processes 20 minutes, since
# the others wait in a collective operation, which fails after 30 minutes by default.
WAIT, WAIT_OF_SEVERAL = 7 * 24 * 3600.0, 20 * 60.0


@contextlib.contextmanager
def folder_lock(folder: str | Path, patience: float | None = None) -> Iterator[None]:
    """Keep other runs out of a folder, which is created. In the thread that holds the lock, it may be entered again.

    The lock is one of the operating system (`flock`, which Linux also keeps on NFS): it ends with the process,
    however that dies. Where the file system has no locks, a warning says so.

    Args:
        patience: Seconds to wait for another run to end; by default `PATIENCE`.

    Raises:
        ValueError: Another run is using the folder.
    """
    folder = Path(folder)
    with _lock(folder.resolve() / LOCK, folder, PATIENCE if patience is None else patience):
        yield


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock with this path, and hold it; the file is removed at the end."""
    with _lock(path, path, WAIT):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # where a lock that is held cannot be removed
                path.unlink(missing_ok=True)


def remove_stale_lock(path: Path) -> None:
    """Remove the file of a [`file_lock`] that a killed process left, unless another one holds it."""
    if path.exists():
        with contextlib.suppress(OSError), FileLock(path, timeout=0):  # Timeout is one
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def run_lock(output_dir: str | Path | None) -> Iterator[None]:
    """Hold the lock of a run's folder, if it has one, in the first of its processes; see [`folder_lock`]."""
    if not output_dir or not is_main_process():
        yield
        return
    with folder_lock(output_dir):
        yield


def exclusive(run: RunT) -> RunT:
    """Decorate the `run` of a command: it holds the lock of `config.output_dir` from its beginning."""

    @functools.wraps(run)
    def locked(config: Any, *args: Any, **kwargs: Any) -> Any:
        with run_lock(config.output_dir):
            return run(config, *args, **kwargs)

    return cast(RunT, locked)


@contextlib.contextmanager
def _lock(path: Path, used: Path, patience: float) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # One object for a path: a command holds the lock of its run before its trainer does.
    lock = FileLock(path, is_singleton=True)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if patience > 0:
                logger.info("another run is using %s; waiting for its end.", used)
            lock.acquire(timeout=max(patience, 0))
    except Timeout:
        raise ValueError(f"another run is using {used}; wait until it has ended, or choose another folder.") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_of_no_locks(path.parent, str(error))
    try:
        yield
    finally:
        lock.release()


@functools.cache
def _warn_of_no_locks(folder: Path, error: str) -> None:
    logger.warning("%s has no file locks (%s): make sure that no other run uses it.", folder, error)
