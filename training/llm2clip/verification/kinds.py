"""The kinds of folder that llm2clip writes, how each is recognized, and how it is checked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip.hub.upload_files import added_files
from llm2clip.search.lance_store import COMMAND as INDEX
from llm2clip.search.verify_index import verify_index
from llm2clip.trainers.checkpoints import COMMAND as TRAINING
from llm2clip.utils.files import read_json
from llm2clip.utils.manifests import (
    FOLDER_MANIFEST,
    MANIFEST_CHECKSUM,
    MODEL_FORMAT,
    MODEL_MANIFEST,
    Fault,
    Verified,
    faults,
    listed_files,
    written_by,
)

# One of these is in every folder of ours with such a manifest.
OUR_FILES = ("modeling_llm2clip*.py", "config.json")
# How folders are written again that are not replaced with --overwrite.
AGAIN = {
    "distill-text": "put the student there again (attach_query_encoder)",
    "quickstart": "delete {folder}; the next quickstart fetches it again",
    None: "write it again, or copy it from where it came",
}


class Kind(NamedTuple):
    """A kind of folder.

    Attributes:
        name: Its name, for messages.
        has: Whether a folder is of this kind, by the fields of its `manifest.json`, which may be none.
        verify: Checks one.
    """

    name: str
    has: Callable[[Path, dict[str, Any]], bool]
    verify: Callable[[Path], Verified]


def verify_listed(folder: Path) -> Verified:
    """Compare the files of a checkpoint, a saved model or another result of a command with their list."""
    found, command = Verified(), written_by(folder)
    again = f"write it again: the same llm2clip {command} with --overwrite"
    fix = AGAIN[command].format(folder=folder) if command in AGAIN else again
    if command == TRAINING:
        fix = "the same command with --resume, which trains again from a whole checkpoint"
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            fix = f"delete {folder}; --resume takes an older checkpoint, as it does if you leave it"
    found.faults = [Fault(f"{folder}: {fault}", fix) for fault in faults(folder)]
    try:
        listed, added = listed_files(folder), added_files(folder)
    except ValueError as error:
        # One of a list is a fault already.
        if not found.faults:
            found.faults.append(Fault(str(error), fix))
        return found
    remove = "delete it, unless you have put it there and trust it"
    found.faults += [
        Fault(f"{folder}: {name} was not written with the model, but would be loaded with it", remove)
        for name in added
    ]
    found.counts = Counter({"num_files": len(listed)})
    return found


def verify_unlisted_checkpoint(folder: Path) -> Verified:
    """Say that a checkpoint has no list of its files."""
    what = "was not finished, or another program wrote it; --resume takes an older checkpoint"
    return Verified(remarks=[f"{folder} has no {FOLDER_MANIFEST}, which is written last: it {what}."])


def _is_index(folder: Path, fields: dict[str, Any]) -> bool:
    return written_by(folder) == INDEX


def _is_listed(folder: Path, fields: dict[str, Any]) -> bool:
    return (folder / FOLDER_MANIFEST).is_file() or fields.get("format") == MODEL_FORMAT


def _is_unlisted_checkpoint(folder: Path, fields: dict[str, Any]) -> bool:
    is_checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name) is not None
    return is_checkpoint and not (folder / FOLDER_MANIFEST).is_file()


KINDS = (
    Kind("search index", _is_index, verify_index),
    Kind("unfinished checkpoint", _is_unlisted_checkpoint, verify_unlisted_checkpoint),
    Kind("checkpoint, model, or another result of a command", _is_listed, verify_listed),
)


def verify_folder(folder: Path) -> Verified:
    """Check the files of one folder, not those of the folders in it that are kinds of their own."""
    path, fields = folder / MODEL_MANIFEST, dict[str, Any]()
    found = Verified()
    try:
        fields = read_json(path) if path.is_file() else {}
    except ValueError as error:
        # A list of files names it too, and others have files of this name.
        if any(next(folder.glob(name), None) for name in OUR_FILES) and not (folder / FOLDER_MANIFEST).is_file():
            found.faults.append(Fault(str(error), f"delete {folder}, and write it again by the command that did"))
            return found
    for kind in KINDS:
        if kind.has(folder, fields):
            return kind.verify(folder)
    if MANIFEST_CHECKSUM in fields:
        found.faults.append(
            Fault(f"{path} has changed since it was written", f"delete {folder}, and write it again as before")
        )
    return found
