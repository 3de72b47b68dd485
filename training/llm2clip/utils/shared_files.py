"""What is computed from whole data sets: once per machine, in a file that all processes and later runs map."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants

from llm2clip.utils.files import atomic_path, digest_json, sha256

logger = logging.getLogger(__name__)


def shared_file(kind: str, identity: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Return a file in the cache of `datasets`, which is written if it does not exist.

    While one process writes it, the others wait for a lock file, which is removed afterwards.

    Args:
        kind: What the file contains, the first part of its name.
        identity: Everything that its content depends on, as JSON; also a version of the code that computes it.
        write: Writes the file at a path.
    """
    folder = _folder()
    path = folder / f"{kind}-{digest_json(identity)}"
    lock = Path(f"{path}.lock")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not path.exists():
                with atomic_path(path) as temporary:
                    write(temporary)
                logger.debug("%s are written to %s.", kind, path)
    # Now that the file exists, the lock excludes nobody: whoever still waits for it, or for a removed one, finds the
    # file. Where a lock file cannot be removed (Windows while others wait, a read-only cache), it does no harm.
    with contextlib.suppress(OSError):
        lock.unlink(missing_ok=True)
    return path


def _folder() -> Path:
    """Return the folder in the cache of `datasets`, which not every command needs to be installed."""
    library = sys.modules.get("datasets")
    if library is not None:
        return Path(library.config.HF_DATASETS_CACHE) / "llm2clip"
    return Path(os.environ.get("HF_DATASETS_CACHE", f"{constants.HF_HOME}/datasets")).expanduser() / "llm2clip"


def stored_sha256(path: Path) -> str:
    """Compute the SHA-256 of a local file, once on this machine as long as the file stays as it is.

    It counts as the same file while its size, inode and times (that of the content and `ctime`, which no program can
    set) are the same.
    """
    status = path.stat()
    state = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    identity = {"path": str(path.resolve()), "state": state}

    def write(own: Path) -> None:
        own.write_text(sha256(path))

    try:
        return shared_file("sha256", identity, write).read_text()
    except OSError:  # the cache cannot be written; an error of the file itself is raised again
        return sha256(path)
