"""The list of the files that a command wrote into a folder: what belongs to it, and whether it is whole.

`.llm2clip.json` has the command, and sizes and checksums (SHA-256) of the files. A built model takes its own along.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from llm2clip.files.atomic import digest_json, flush_file, flush_folder, read_json, sha256, write_json
from llm2clip.files.shared_files import stored_sha256

if TYPE_CHECKING:
    from llm2clip.files.remote_path import AnyPath

FOLDER_MANIFEST = ".llm2clip.json"
# What people edit, and `llm2clip push` too; nothing computes from it.
EDITED = frozenset({"README.md", "LICENSE"})
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg"})
# Endings of what a model is loaded from.
LOADED = frozenset({".safetensors", ".json", ".py", ".txt", ".model", ".jinja"})
# Folder of a query encoder within that of its model.
QUERY_ENCODER = "query_encoder"
# A manifest that no other file lists has the checksum of its other fields.
MANIFEST_CHECKSUM = "manifest_checksum"
CHANGED = f"{{}} has changed: its checksum is not that in {FOLDER_MANIFEST}"


class Fault(NamedTuple):
    """A damaged or missing file: its path with what is wrong, and how to fix only that."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what.rstrip('.')}. To fix it: {self.fix}."


@dataclass
class Verified:
    """What was found.

    Attributes:
        counts: What was checked, such as `num_files`.
        faults: What is damaged or missing.
        remarks: What could not be checked, or was not finished.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, other: Verified) -> None:
        """Add what was found in another folder."""
        self.counts += other.counts
        self.faults += other.faults
        self.remarks += other.remarks


class ListedFile(NamedTuple):
    """A file of a list: its bytes, and its SHA-256 if that is recorded."""

    size: int
    checksum: str | None


def with_checksum(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a manifest with their checksum."""
    return {**fields, MANIFEST_CHECKSUM: digest_json(fields)}


def read_checked(path: AnyPath, by_hand: bool = False) -> dict[str, Any]:
    """Read a JSON file written [`with_checksum`], without that.

    Args:
        by_hand: Whether people may change it, who then delete the checksum.

    Raises:
        ValueError: It is damaged, or has changed since it was written.
    """
    fields = read_json(path)
    checksum = fields.pop(MANIFEST_CHECKSUM, None)
    if checksum != digest_json(fields) and not (by_hand and checksum is None):
        hint = f" (if it is meant, delete its {MANIFEST_CHECKSUM})" if by_hand else ""
        raise ValueError(f"{path} has changed since it was written{hint}.")
    return fields


def write_manifest(
    folder: AnyPath,
    command: str,
    names: Iterable[str] | None = None,
    unlisted: Collection[str] = (),
    checksum: Callable[[Path], str] = sha256,
) -> None:
    """List the files of a folder with sizes and checksums, after they have reached the disk.

    Those of a remote folder have sizes alone, since a checksum would read all of them over the network.

    Args:
        command: The command that wrote the folder, such as `build`.
        names: The files; by default everything below the folder.
        unlisted: Files that are left out.
        checksum: Computes the checksum of a file; [`stored_sha256`] where most have not changed since the last list.
    """
    fields: dict[str, Any] = {"written_by": f"llm2clip {command}"}
    if not isinstance(folder, Path):
        sizes = {name: size for name, size in folder.sizes().items() if name not in {*unlisted, FOLDER_MANIFEST}}
        write_json(folder / FOLDER_MANIFEST, with_checksum({**fields, "files": sizes}))
        return
    chosen = folder_files(folder) if names is None else names
    files = {name: folder / name for name in chosen if name not in unlisted}
    for path in files.values():
        flush_file(path)
    for parent in {path.parent for path in files.values()}:
        flush_folder(parent)
    of_card = command == "build"
    fields["files"] = {name: path.stat().st_size for name, path in files.items()}
    fields["sha256"] = {name: checksum(path) for name, path in files.items() if not _is_edited(name, of_card)}
    write_json(folder / FOLDER_MANIFEST, with_checksum(fields))
    for path in files.values():
        if path.suffix == ".safetensors":
            # safetensors lets nobody but their owner read its files, whatever the umask of others is.
            with contextlib.suppress(OSError):
                shutil.copymode(folder / FOLDER_MANIFEST, path)


def written_by(folder: AnyPath) -> str | None:
    """Return the command that wrote a folder, such as `build`; None if its manifest does not say so."""
    try:
        command = read_json(folder / FOLDER_MANIFEST).get("written_by")
    except (OSError, ValueError):
        return None
    return command.removeprefix("llm2clip ") if isinstance(command, str) else None


def own_files(folder: AnyPath, command: str) -> dict[str, ListedFile] | None:
    """Return the files that the manifest of a folder lists, or None if `command` did not write the folder."""
    try:
        return listed_files(folder) if written_by(folder) == command else None
    except (OSError, ValueError):
        return None


def listed_files(folder: AnyPath) -> dict[str, ListedFile]:
    """Return the files that the manifest of a folder lists; none if it has no manifest.

    Those of a folder that was written at a URL have no checksums.

    Raises:
        ValueError: The manifest is damaged.
    """
    path = folder / FOLDER_MANIFEST
    try:
        fields = read_checked(path)
    except FileNotFoundError:
        return {}
    sizes, checksums = fields.get("files"), fields.get("sha256", {})
    if not isinstance(sizes, dict) or not isinstance(checksums, dict):
        raise ValueError(f"no list of files in {FOLDER_MANIFEST}")
    for name in sizes:
        if PurePosixPath(name).is_absolute() or Path(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{path} names {name}, which is outside of the folder")
    return {name: ListedFile(size, checksums.get(name)) for name, size in sizes.items()}


def faults(folder: Path, contents: bool = True) -> Iterator[str]:
    """Yield what differs between a folder and its manifest, in words: the name of each file, and what is wrong.

    Args:
        contents: Compare checksums, which reads the files, and not only sizes.
    """
    try:
        known = listed_files(folder)
    except ValueError as error:
        yield str(error).rstrip(".")
        return
    for name, listed in known.items():
        path = folder / name
        if _is_edited(name, of_card=listed.checksum is None):
            continue
        if not path.is_file():
            yield f"{name} is missing"
        elif (size := path.stat().st_size) != listed.size:
            yield f"{name} has {size} bytes instead of {listed.size}"
        elif contents and listed.checksum is not None and sha256(path) != listed.checksum:
            yield CHANGED.format(name)


def damage(folder: Path, contents: bool = False) -> str | None:
    """Return the first difference between a folder and its manifest, or None if there is none; see [`faults`]."""
    if not (folder / FOLDER_MANIFEST).is_file():
        return f"no {FOLDER_MANIFEST}, which is written last"
    return next(faults(folder, contents), None)


def refuse_damaged(folder: str | Path) -> None:
    """Raise a `ValueError` if a local folder differs from its manifest. One without it, or none, passes."""
    if Path(folder).is_dir() and (fault := next(faults(Path(folder)), None)) is not None:
        raise _changed(Path(folder), fault)


def refuse_changed_model(folder: str | Path) -> None:
    """Raise a `ValueError` if what a local model is loaded from are not the files that its manifest lists.

    Each is read for that when it is loaded first since it has changed. What is not a model of ours passes.
    """
    folder = Path(folder)
    for name, listed in listed_files(folder).items() if folder.is_dir() else ():
        path = folder / name
        in_place = path.parent == folder or folder / QUERY_ENCODER in path.parents
        is_loaded = path.suffix in LOADED and in_place and path.is_file()
        if is_loaded and listed.checksum is not None and stored_sha256(path) != listed.checksum:
            raise _changed(folder, CHANGED.format(name))


def _changed(folder: Path, fault: str) -> ValueError:
    return ValueError(
        f"{folder} is not what was written ({fault}). Write or copy it again, or, if you changed it yourself, delete "
        f"{FOLDER_MANIFEST} in it."
    )


def _is_edited(name: str, of_card: bool) -> bool:
    """Tell whether people edit a file; pictures of a card (`of_card`) too, but not those of a run."""
    path = PurePosixPath(name)
    return path.name in EDITED or (of_card and path.suffix.lower() in PICTURES)


def folder_files(folder: Path) -> list[str]:
    """List everything below a folder except folders and its manifest; a link to a folder counts as a file.

    Raises:
        OSError: A folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    paths = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        paths += [os.path.relpath(os.path.join(parent, name), folder) for name in [*names, *links]]
    return sorted(Path(name).as_posix() for name in paths if name != FOLDER_MANIFEST)
