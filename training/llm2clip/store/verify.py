"""Verification of stored rows: whether they are what was written, and whether a store is complete."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from llm2clip.command_line.progress import ProgressBar
from llm2clip.files.manifests import Fault, Verified
from llm2clip.files.remote_path import AnyPath, local_copy
from llm2clip.store.manifest import (
    MANIFEST_SUFFIX,
    ROWS_SUFFIX,
    StoreError,
    StoreManifest,
    manifest_path,
    rows_path,
)
from llm2clip.store.shards import ShardFile
from llm2clip.store.store import INDEX, SIDECAR

NAMES = re.compile(rf"(index|shard-\d+|.+{re.escape(SIDECAR)}){re.escape(MANIFEST_SUFFIX)}")
ROWS = re.compile(rf"(shard-\d+|.+{re.escape(SIDECAR)}){re.escape(ROWS_SUFFIX)}")
# Kinds of which something else was made before an update was interrupted, and is whole.
UPDATED = ("images", "texts")


def manifest_paths(folder: AnyPath) -> Iterator[AnyPath]:
    """Yield the manifests of all stored rows below a folder, without hidden folders, which are unfinished."""
    for path in folder.rglob(f"*{MANIFEST_SUFFIX}"):
        if NAMES.fullmatch(path.name) and "/." not in str(path).removeprefix(str(folder)):
            yield path


def verify_store(folder: AnyPath) -> tuple[Verified, dict[AnyPath, StoreManifest]]:
    """Read all stored rows below a folder, and compare them with their checksums.

    Args:
        folder: Local, or a URL.

    Returns:
        What was found, and the manifests that can be read.
    """
    verified, read = Verified(), dict[AnyPath, StoreManifest]()
    paths = sorted(manifest_paths(folder), key=str)
    with ProgressBar("Verifying shards", len(paths), "shard", show=bool(paths)) as bar:
        for path in paths:
            rows = rows_path(path)
            again = "run the command that wrote it again, which only computes what is missing"
            try:
                read[path] = StoreManifest.read(path)
                again = f"{read[path].about.remedy}, which only computes what is missing"
                with local_copy(rows) as local:
                    ShardFile.of(local, read[path], rows).require_unchanged(always=True)
            except (StoreError, OSError) as error:
                what = str(error).partition("; ")[0] if isinstance(error, StoreError) else f"{rows}: {error}"
                verified.faults.append(Fault(what, f"delete {path} and {again}"))
            bar.update()
    unlisted = (path for path in folder.rglob(f"shard-*{ROWS_SUFFIX}") if ROWS.fullmatch(path.name))
    for parent in sorted({path.parent for path in [*paths, *unlisted]}, key=str):
        index, faults = read.get(parent / INDEX), list(_incomplete(parent, read))
        if index is None or index.kind not in UPDATED:
            verified.faults += [fault for fault, _ in faults]
            continue
        verified.faults += [fault for fault, is_lost in faults if is_lost]
        verified.remarks += [f"{fault.what}; {fault.fix}." for fault, is_lost in faults if not is_lost]
    shards = [manifest for path, manifest in read.items() if path.name != INDEX]
    verified.counts = Counter({"num_shards": len(shards)} if paths else {})
    for manifest in shards:
        verified.counts[f"num_{manifest.about.unit}s"] += manifest.rows
    return verified, read


def _incomplete(folder: AnyPath, read: dict[AnyPath, StoreManifest]) -> Iterator[tuple[Fault, bool]]:
    """Name rows without a manifest, and an index that is missing or does not fit its shards.

    Yields:
        The fault, and whether a row is lost that was there before the last run.
    """
    inside: list[AnyPath] = sorted(folder.iterdir(), key=str)
    names = {path.name for path in inside}
    shards = {
        rows_path(path).name: manifest
        for path, manifest in read.items()
        if path.parent == folder and path.name.startswith("shard-")
    }
    index = read.get(folder / INDEX)
    listed, remedy = (index.shards, index.about.remedy) if index is not None else ({}, "")
    for path in inside:
        if ROWS.fullmatch(path.name) and manifest_path(path).name not in names:
            is_listed = path.name in listed
            fault = Fault(f"{path} has no manifest: it was not finished", "run the command that writes it again")
            yield fault, is_listed
    if shards and (INDEX not in names or (index is not None and not shards.keys() <= listed.keys())):
        about = next(iter(shards.values())).about
        yield Fault(f"the build of {folder} was interrupted", f"{about.remedy}, which continues it"), False
    for name, (rows, _, checksum) in listed.items():
        if name not in names and name not in shards:
            yield (
                Fault(f"the shard {folder / name} is missing", f"{remedy}, which only computes what is missing"),
                True,
            )
        elif name in shards and (shards[name].rows, shards[name].checksum) != (rows, checksum):
            yield Fault(f"{folder / INDEX} does not fit {name}", f"delete {folder / INDEX} and {remedy}"), True
