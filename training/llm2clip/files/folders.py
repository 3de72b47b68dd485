"""Folders that appear complete or not at all, and that replace only what the same command wrote."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2clip.command_line.logs import shortened
from llm2clip.files.atomic import leftovers, temporary_name
from llm2clip.files.library_errors import wrap_write_errors
from llm2clip.files.locks import lock_beside
from llm2clip.files.manifests import FOLDER_MANIFEST, folder_files, own_files, write_manifest

logger = logging.getLogger(__name__)

# In a temporary folder: the folder that the new one replaces.
REPLACED = "replaced"


@contextmanager
def atomic_folder(destination: Path, command: str, overwrite: bool = False) -> Iterator[Path]:
    """Create a folder that becomes `destination` when the block ends, and is removed when the block raises.

    Its files reach the disk before an existing folder is replaced, which keeps its name if that fails. A destination
    that is a link stays one: the folder that it leads to is created or replaced. What a killed process has left is
    removed, and a folder that it was about to replace gets its name back.

    Args:
        command: The command that writes it, which the manifest of the folder names.
        overwrite: Replace an existing folder; see [`refuse_existing`].

    Raises:
        FileExistsError: See [`refuse_existing`].
        ValueError: Another run is writing it.
    """
    destination = destination.resolve()
    scratch = temporary_name(destination)
    folder = scratch / destination.name
    with lock_beside(destination, patience=0):
        for left in leftovers(destination):
            if _remove(left, destination):
                logger.warning("%s is back, which a killed run was about to replace.", destination)
        refuse_existing(destination, command, overwrite)
        folder.mkdir(parents=True)
        try:
            with wrap_write_errors(destination):
                yield folder
                write_manifest(folder, command)
            # People may have put something into it meanwhile.
            refuse_existing(destination, command, overwrite)
            if destination.exists():
                destination.rename(scratch / REPLACED)
            folder.rename(destination)
        finally:
            _remove(scratch, destination)


def _remove(scratch: Path, destination: Path) -> bool:
    """Remove a temporary folder; returns whether the folder that it was about to replace has got its name back."""
    is_needed = (scratch / REPLACED).exists() and not destination.exists()
    if is_needed:
        (scratch / REPLACED).rename(destination)
    shutil.rmtree(scratch, ignore_errors=True)
    return is_needed


def refuse_existing(destination: Path, command: str, overwrite: bool) -> None:
    """Raise FileExistsError if `destination` exists and must not be replaced.

    With `overwrite`, a folder is replaced if it is empty, or if `command` wrote it and it holds nothing else.
    """
    if not destination.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{destination} exists; add --overwrite to replace it, or choose another destination.")
    if not destination.is_dir():
        raise FileExistsError(f"{destination} is a file, and is not replaced by a folder; choose another destination.")
    if os.path.ismount(destination):
        raise FileExistsError(
            f"{destination} is where a disk is mounted, and cannot be replaced; choose a folder in it."
        )
    if not any(destination.iterdir()):
        return
    known = own_files(destination, command)
    if known is None:
        raise FileExistsError(
            f"{destination} is not replaced, because llm2clip {command} did not write it (no {FOLDER_MANIFEST} that "
            "says so); choose another destination, or delete the folder yourself."
        )
    if foreign := [name for name in folder_files(destination) if name not in known]:
        raise FileExistsError(
            f"{destination} is not replaced, because it contains other files than those that llm2clip {command} wrote "
            f"({shortened(foreign)}); move them away, or choose another destination."
        )


def refuse_nested(source: str | Path, destination: Path) -> None:
    """Raise ValueError if a local source and a destination are the same, or one of them is inside the other."""
    if not Path(source).exists():
        return
    inner, outer = Path(source).resolve(), destination.resolve()
    if inner.is_relative_to(outer):
        raise ValueError(f"{destination} contains the source {source}; choose a destination outside of it.")
    if outer.is_relative_to(inner):
        raise ValueError(f"{destination} is inside the source {source}; choose a destination outside of it.")
