"""What is computed from whole data sets: once per machine, in a file that all processes and later runs map."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from llm2clip.files.atomic import atomic_path, digest_json, leftovers, sha256
from llm2clip.files.locks import lock_beside

logger = logging.getLogger(__name__)


def shared_file(kind: str, identity: Mapping[str, Any], write: Callable[[Path], object]) -> Path:
    """Return a file in the cache of `datasets`, which is written if it does not exist.

    While one process writes it, the others wait.

    Args:
        kind: What the file contains, the first part of its name.
        identity: Everything that its content depends on, as JSON; also a version of the code that computes it.
        write: Writes the file at a path.
    """
    path = _folder() / f"{kind}-{digest_json(identity)}"
    if not path.exists():
        with lock_beside(path) as was_killed:
            for left in leftovers(path) if was_killed else []:
                left.unlink()
            if not path.exists():
                with atomic_path(path) as temporary:
                    write(temporary)
                logger.debug("%s are written to %s.", kind, path)
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
    set) are the same. The checksums of a folder's files are lines of one file in the cache of `datasets`.
    """
    path = path.resolve()
    status = path.stat()
    state = f"{path.name} {status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"
    record = _folder() / f"sha256-{digest_json(str(path.parent))}"
    known = _checksums(record)
    if state not in known:
        known[state] = sha256(path)
        with contextlib.suppress(OSError):  # the cache cannot be written: it is computed again next time
            record.parent.mkdir(parents=True, exist_ok=True)
            with record.open("a", encoding="utf-8") as file:
                file.write(f"{state} {known[state]}\n")
    return known[state]


@functools.lru_cache(maxsize=256)
def _checksums(record: Path) -> dict[str, str]:
    """Read the lines of a file of [`stored_sha256`]; the last one of a killed process may be cut."""
    with contextlib.suppress(OSError):
        lines = (line.rpartition(" ") for line in record.read_text(encoding="utf-8").splitlines())
        return {state: checksum for state, _, checksum in lines if len(checksum) == 64}
    return {}
