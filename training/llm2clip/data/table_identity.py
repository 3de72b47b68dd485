"""What identifies the rows of a table, or the files of a stream, in the names of files that are computed from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from llm2clip.utils.shared_files import shared_file

BATCH = 1000
# Of the function that hashes rows.
DIGEST_VERSION = 1
# Of a stream, whose files may be many and large.
SAMPLED_FILES, SAMPLED_BYTES = 64, 2**16


def table_identity(table: datasets.Dataset) -> str:
    """Identify the rows of a table by the fingerprint that `datasets` names its own cached files after."""
    return table._fingerprint


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
