"""What is computed from whole data sets: once per machine, in a file that all processes and later runs map."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock

from llm2clip.utils.files import atomic_path, digest_json

logger = logging.getLogger(__name__)


def table_identity(table: datasets.Dataset) -> str:
    """Identify the rows of a table by the fingerprint that `datasets` names its own cached files after."""
    return table._fingerprint


def shared_file(kind: str, identity: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Return a file in the cache of `datasets`, which is written if it does not exist.

    While one process writes it, the others wait for a lock file, which is removed afterwards.

    Args:
        kind: What the file contains, the first part of its name.
        identity: Everything that its content depends on, as JSON; also a version of the code that computes it.
        write: Writes the file at a path.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "llm2clip"
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
