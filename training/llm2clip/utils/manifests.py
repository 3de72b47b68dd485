"""The list of the files that a command wrote into a folder: what belongs to it, and whether it is whole."""

from __future__ import annotations

import os
from pathlib import Path

from llm2clip.utils.files import flush_file, flush_folder, read_json, write_json
from llm2clip.utils.remote_path import AnyPath

# Its name starts with a dot, so that `llm2clip push` leaves it here.
FOLDER_MANIFEST = ".llm2clip.json"


def write_manifest(folder: AnyPath, command: str) -> None:
    """List the files of a folder with their sizes, after they have reached the disk.

    Args:
        command: The command that wrote the folder, such as `build`.
    """
    sizes = _flushed(folder) if isinstance(folder, Path) else folder.sizes()
    sizes.pop(FOLDER_MANIFEST, None)
    write_json(folder / FOLDER_MANIFEST, {"written_by": f"llm2clip {command}", "files": sizes})


def _flushed(folder: Path) -> dict[str, int]:
    """Bring the files of a folder to the disk, and return their sizes."""
    paths = [folder / name for name in _files(folder)]
    for path in paths:
        flush_file(path)
    for parent in {path.parent for path in paths}:
        flush_folder(parent)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def foreign_files(folder: Path, command: str) -> list[str] | None:
    """Return the files of a folder that its manifest does not list, or None if `command` did not write the folder."""
    known = own_files(folder, command)
    return None if known is None else [name for name in _files(folder) if name not in known]


def own_files(folder: AnyPath, command: str) -> dict[str, int] | None:
    """Return the files that the manifest of a folder lists, with sizes; None if `command` did not write the folder."""
    try:
        manifest = read_json(folder / FOLDER_MANIFEST)
    except (OSError, ValueError):
        return None
    known = manifest.get("files")
    if manifest.get("written_by") != f"llm2clip {command}" or not isinstance(known, dict):
        return None
    return known


def damage(folder: Path) -> str | None:
    """Return what differs between a folder and its manifest, in words, or None if the folder is whole."""
    path = folder / FOLDER_MANIFEST
    if not path.is_file():
        return f"no {FOLDER_MANIFEST}, which is written last"
    try:
        known = read_json(path).get("files")
    except ValueError as error:
        return str(error)
    if not isinstance(known, dict):
        return f"no list of files in {FOLDER_MANIFEST}"
    for name, size in known.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def _files(folder: Path) -> list[str]:
    """List everything below a folder except folders and the manifest; a link to a folder counts as a file."""
    found = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in [*names, *links]]
    return sorted(Path(name).as_posix() for name in found if name != FOLDER_MANIFEST)
