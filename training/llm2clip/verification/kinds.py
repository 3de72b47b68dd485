"""The kinds of folder that llm2clip writes, how each is recognized, and how it is checked."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip.files.atomic import read_json
from llm2clip.files.manifests import (
    FOLDER_MANIFEST,
    MANIFEST_CHECKSUM,
    Fault,
    Verified,
    faults,
    listed_files,
    written_by,
)
from llm2clip.hub.upload_files import added_files
from llm2clip.search.lance_store import COMMAND as INDEX
from llm2clip.search.lance_store import MANIFEST, TABLES
from llm2clip.search.verify_index import verify_index
from llm2clip.trainers.checkpoints import COMMAND as TRAINING

KINDS = ("search index", "unfinished checkpoint", "checkpoint, model, or another result of a command")
# How folders are written again that are not replaced with --overwrite.
REWRITE_HINTS = {
    INDEX: "delete {folder}, and run the same llm2clip index again, which makes it again from the stored embeddings",
    "distill-text": "put the student there again (attach_query_encoder)",
    "quickstart": "delete {folder}; the next quickstart fetches it again",
    None: "write it again, or copy it from where it came",
}


def verify_listed(folder: Path) -> Verified:
    """Compare the files of a checkpoint, a saved model or another result of a command with their list."""
    command = written_by(folder)
    again = f"write it again: the same llm2clip {command} with --overwrite"
    fix = REWRITE_HINTS[command].format(folder=folder) if command in REWRITE_HINTS else again
    if command == TRAINING:
        fix = "the same command with --resume, which trains again from a whole checkpoint"
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            fix = f"delete {folder}; --resume takes an older checkpoint, as it does if you leave it"
    damaged = [Fault(f"{folder}: {fault}", fix) for fault in faults(folder)]
    try:
        listed, added = listed_files(folder), added_files(folder)
    except ValueError as error:
        # One of a list is a fault already.
        return Verified(faults=damaged or [Fault(str(error), fix)])
    remove = "delete it, unless you have put it there and trust it"
    loaded = "was not written with the model, but would be loaded with it"
    foreign = [Fault(f"{folder}: {name} {loaded}", remove) for name in added]
    return Verified(Counter({"num_files": len(listed)}), damaged + foreign)


def verify_folder(folder: Path) -> Verified:
    """Check the files of one folder of a kind in `KINDS`, not those of the folders in it.

    Returns:
        Nothing of a folder that is of no kind.
    """
    path, is_listed = folder / MANIFEST, (folder / FOLDER_MANIFEST).is_file()
    if any(folder.glob(TABLES)):
        return verify_index(folder)
    if not is_listed and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name):
        what = "was not finished, or another program wrote it; --resume takes an older checkpoint"
        return Verified(remarks=[f"{folder} has no {FOLDER_MANIFEST}, which is written last: it {what}."])
    if is_listed:
        return verify_listed(folder)
    with contextlib.suppress(OSError, ValueError):  # others have files of this name
        if MANIFEST_CHECKSUM in read_json(path):
            fault = f"{path} has changed since it was written"
            return Verified(faults=[Fault(fault, f"delete {folder}, and write it again as before")])
    return Verified()
