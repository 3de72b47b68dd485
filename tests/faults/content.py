"""What a folder contains, apart from what two equal runs write differently: times, versions of rows, logs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from llm2clip.command_line.logs import LOG_FILE
from llm2clip.files.locks import LOCK
from llm2clip.files.manifests import FOLDER_MANIFEST, MANIFEST_CHECKSUM
from llm2clip.search.search_index import SearchIndex

# Files that say how a run went and not what it made.
IGNORED = re.compile(rf"(\..+)?{re.escape(LOCK)}|{re.escape(LOG_FILE)}")
# Only the presence of these counts: pickled settings, and text for people with times in it.
PRESENT = {".bin", ".md", ".html", ".txt"}
TENSORS = {".pt", ".pth"}
# A tokenizer is saved with the padding of its last call, and a run without a step makes none. The mean loss and the
# epochs in the state of a resumed run are those since it was resumed.
VOLATILE = re.compile(
    r".*_runtime|.*_per_second|padding|truncation|mtime_ns|date|seconds|versions|stored"
    r"|train_loss|num_train_epochs"
    rf"|{MANIFEST_CHECKSUM}"  # of such fields too
)
TABLES = "images-*.lance"
UNREADABLE = "unreadable: "

Content = dict[str, str]


def content(folder: Path) -> Content:
    """Return a digest of every file below a folder by its path; an index of images is one entry, its rows.

    Of a file that cannot be read it is `UNREADABLE` and why.
    """
    found: Content = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if not any(PurePath(part).match(TABLES) for part in path.parts):
            found[name] = _readable(_digest, path)
    for index in {table.parent for table in folder.rglob(TABLES)}:
        found[(index.relative_to(folder) / TABLES).as_posix()] = _readable(_rows, index)
    return found


def _readable(digest: Callable[[Path], str], path: Path) -> str:
    try:
        return digest(path)
    except Exception as error:  # libraries raise all kinds
        return f"{UNREADABLE}{error}"


def differences(found: Content, expected: Content) -> list[str]:
    """Return the paths that differ, with what is the matter."""
    missing = [f"{name} is missing" for name in expected if name not in found]
    more = [f"{name} is left over" for name in found if name not in expected]
    other = [f"{name} differs" for name in expected if name in found and found[name] != expected[name]]
    return sorted(missing + other + more)


def digest_bytes(value: bytes) -> str:
    """Return the digest of the bytes of a file."""
    return hashlib.sha256(value).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not IGNORED.fullmatch(path.name))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            _add(digest, [file.metadata(), {name: file.get_tensor(name) for name in sorted(file.keys())}])
    elif path.suffix in TENSORS:
        # Written by this test; the random states are arrays of numpy.
        _add(digest, torch.load(path, weights_only=False))
    elif path.suffix == ".json" or path.name.endswith(".manifest"):
        value = json.loads(path.read_text(encoding="utf-8"))
        # Sizes and checksums of files whose times differ.
        _add(digest, sorted(value["files"]) if path.name == FOLDER_MANIFEST else value)
    elif path.suffix not in PRESENT:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous().view(torch.uint8) if value.ndim else value.item()
    if isinstance(value, dict):
        for key in sorted(value, key=repr):
            if not (isinstance(key, str) and VOLATILE.fullmatch(key)):
                digest.update(repr(key).encode())
                _add(digest, value[key])
    elif isinstance(value, list | tuple):
        for entry in value:
            _add(digest, entry)
    elif isinstance(value, torch.Tensor | np.ndarray):
        digest.update(np.asarray(value).tobytes())
    else:
        digest.update(repr(value).encode())


def _rows(folder: Path) -> str:
    opened, digest = SearchIndex.open(folder), hashlib.sha256()
    for batch in opened.store.keys(["key", "folder", "extension", "size", "_digest", "vector"]):
        _add(digest, batch.to_pylist())
    return digest.hexdigest()
