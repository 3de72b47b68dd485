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
    """What identifies the content of a data set now.

    Args:
        source: A path or a mapping with fields of `CaptionSource`; `path`, `name` and `revision` are used.

    Returns:
        Of a data set on the Hub its commit, of which offline that in the cache of `datasets`. Of local files 16
        hexadecimal digits, a checksum of their relative paths, their sizes, and their first and last 64 KiB, so that
        terabytes take no longer than many small files. The given revision of a URL, and where the commit is not known.
    """
    fields = {"path": source} if isinstance(source, str) else source
    path, revision = fields["path"], fields.get("revision")
    place = Path(path).expanduser()
    if place.is_dir():
        return _checksum(place, [file for file in place.rglob("*") if not _is_hidden(file.relative_to(place))])
    if "://" in path:
        return revision
    files = [place] if place.is_file() else [Path(file) for file in glob.glob(str(place), recursive=True)]
    if files:
        return _checksum(Path(os.path.commonpath([file.parent for file in files])), files)
    try:
        commit = datasets.load_dataset_builder(path, fields.get("name"), revision=revision).hash
    except Exception as error:  # of any kind that a network has, and what was measured is worth more than this note
        logger.warning("the commit of %s is not recorded: %s", path, error)
        return revision
    return commit if commit is not None and COMMIT.fullmatch(commit) else revision


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


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


__all__ = ["data_revision"]
