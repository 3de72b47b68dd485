"""The identity of data: a commit on the Hub, or a checksum of local files."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

logger = logging.getLogger(__name__)

EDGE = 65_536
COMMIT = re.compile(r"[0-9a-f]{40}")


def data_revision(source: str | Mapping[str, Any]) -> str | None:
    """Identify the present content of a data set.

    Args:
        source: A path, or a mapping with fields of `CaptionSource`, of which `path`, `name` and `revision` are used.

    Returns:
        For a data set on the Hub, its commit; offline, the commit in the cache of `datasets`. For local files, a
        checksum (16 hexadecimal digits) of their relative paths, their sizes, and their first and last 64 KiB, which
        is quick for terabytes too. For a URL, or when the commit is unknown, the given revision.
    """
    fields = {"path": source} if isinstance(source, str) else source
    path, revision = fields["path"], fields.get("revision")
    place = Path(path).expanduser()
    if place.is_dir():
        names = (file.relative_to(place) for file in place.rglob("*"))
        return _checksum(place, [place / name for name in names if not any(part[0] == "." for part in name.parts)])
    if "://" in path:
        return revision
    files = [place] if place.is_file() else [Path(file) for file in glob.glob(str(place), recursive=True)]
    if files:
        return _checksum(Path(os.path.commonpath([file.parent for file in files])), files)
    try:
        commit = datasets.load_dataset_builder(path, fields.get("name"), revision=revision).hash
    except Exception as error:  # network errors have many types, and none of them may lose the results
        logger.warning("the commit of %s is unknown: %s", path, error)
        return revision
    return commit if commit is not None and COMMIT.fullmatch(commit) else revision


def _checksum(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(file for file in files if file.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(EDGE, size - EDGE))
            digest.update(file.read())
    return digest.hexdigest()[:16]
