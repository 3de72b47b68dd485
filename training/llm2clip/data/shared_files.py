"""What is computed from whole data sets: once per machine, in a file that all processes and later runs map."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock

from llm2clip.utils.files import atomic_path, digest_json

logger = logging.getLogger(__name__)

BATCH = 1000
# Of the function that hashes rows.
DIGEST_VERSION = 1
# Of a stream, whose files may be many and large.
SAMPLED_FILES, SAMPLED_BYTES = 64, 2**16


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


def rows_digest(table: datasets.Dataset) -> str:
    """Hash the values of the rows of a table in their order; of equal rows in other files, it is the same."""

    def write(path: Path) -> None:
        digest = hashlib.sha256()
        for batch in table.iter(BATCH):
            digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
        path.write_text(digest.hexdigest()[:16])

    return shared_file("rows", {"version": DIGEST_VERSION, "table": table_identity(table)}, write).read_text()


def sampled_files_digest(files: Sequence[str]) -> str:
    """Hash the sizes of local files in their order, and of some of them both ends; those of URLs are not read."""
    local = [file for file in files if os.path.isfile(file)]
    digest = hashlib.sha256(json.dumps([os.path.getsize(file) for file in local]).encode())
    for position in sorted({int(place) for place in np.linspace(0, len(local) - 1, SAMPLED_FILES)} if local else ()):
        with open(local[position], "rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(-min(SAMPLED_BYTES, os.path.getsize(local[position])), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:16]
