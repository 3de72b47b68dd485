"""A lock on a folder or file, so that two runs do not write it at the same time."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from llm2clip.command_line.progress import is_main_process

logger = logging.getLogger(__name__)

LOCK = ".lock"
# Errors of network file systems that have no locks.
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# Seconds to wait for the DataLoader workers of a killed run, which notice its end after a few seconds.
PATIENCE = 15.0
# Seconds to wait for another run that computes what this one needs: a week.
WAIT = 7 * 24 * 3600.0


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


def run_lock(output_dir: str | Path | None) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a run's folder, if it has one, in the first of its processes; see [`folder_lock`]."""
    return folder_lock(output_dir) if output_dir and is_main_process() else contextlib.nullcontext()


@contextlib.contextmanager
def lock_beside(path: Path, patience: float = WAIT) -> Iterator[bool]:
    """Keep other runs from writing a file or folder, by a file beside it, which is removed at the end.

    Args:
        patience: Seconds to wait for another run to end.

    Yields:
        Whether the run before was killed, or may have been, so that it may have left temporary files.

    Raises:
        ValueError: Another run is writing it.
    """
    lock = path.with_name(f".{path.name}{LOCK}")
    existed = lock.exists()
    with _lock(lock, path, patience) as is_held:
        try:
            yield existed and is_held
        finally:
            # Who waits for the removed file sees it (filelock 3.21), and makes a new one.
            with contextlib.suppress(OSError):  # where a lock that is held cannot be removed
                lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(path: Path, used: Path, patience: float) -> Iterator[bool]:
    """Hold a lock; yields whether the file system has locks."""
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
        yield lock.is_locked
    finally:
        lock.release()


@functools.cache
def _warn_of_no_locks(folder: Path, error: str) -> None:
    logger.warning("%s has no file locks (%s): make sure that no other run uses it.", folder, error)
