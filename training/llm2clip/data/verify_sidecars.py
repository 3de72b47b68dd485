"""Whether the shards of a data set are those that were embedded, and which have no sidecar."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from llm2clip.data.shard_rows import RowRange
from llm2clip.data.sidecars import REMEDY, gaps, row_range, shard_stem, unfinished_files
from llm2clip.store.manifest import MANIFEST_SUFFIX, StoreManifest
from llm2clip.store.store import BESIDE
from llm2clip.utils.files import sha256
from llm2clip.utils.manifests import Fault, Verified
from llm2clip.utils.remote_path import AnyPath

FIX = REMEDY[0].lower() + REMEDY[1:].rstrip(".")


def verify_sources(folder: AnyPath, manifests: Mapping[AnyPath, StoreManifest], contents: bool = True) -> Verified:
    """Compare the shards of a data set with the manifests of the sidecars below a folder.

    Args:
        folder: Local, or a URL.
        manifests: All manifests below it; those that belong to no shard are left out.
        contents: Read local shards, and compare them with their checksums.
    """
    found = Verified()
    beside = {path: one for path, one in manifests.items() if one.source is not None}
    checksum = functools.lru_cache(sha256)  # the parts of a file are of one
    for path, manifest in beside.items() if contents else ():
        if changed := _changed_source(path, manifest, checksum):
            found.faults.append(Fault(changed, f"restore that shard, or delete {path} and {FIX}"))
    for parent in sorted({path.parent for path in beside}, key=str):
        here = {path: one for path, one in beside.items() if path.parent == parent}
        found.faults += [Fault(missing, FIX) for missing in _without_sidecar(parent, here, found)]
    for unfinished in sorted(map(str, unfinished_files(folder))):
        found.remarks.append(f"{unfinished} is what a run has not finished: it still writes it, or was killed.")
    return found


def _changed_source(path: AnyPath, manifest: StoreManifest, checksum: Callable[[Path], str]) -> str | None:
    """Compare the shard of a sidecar, wherever it is, with its manifest; return what differs, in words."""
    source = manifest.source
    assert source is not None
    place = path.with_name(source.name) if source.path is None else source.path
    if isinstance(place, str) and "://" not in place:
        place = Path(place)
    if not isinstance(place, Path) or not place.is_file() or source.checksum is None:
        return None
    try:
        found = f"sha256:{checksum(place)}"
    except OSError as error:
        return f"the shard {place} cannot be read: {error}"
    return None if found == source.checksum else f"the shard {place} has changed since it was embedded"


def _without_sidecar(folder: AnyPath, here: Mapping[AnyPath, StoreManifest], found: Verified) -> Iterator[str]:
    """Name the shards and parts that have no sidecar while others of their source do, wherever the shards lie.

    Args:
        here: The manifests in the folder.
        found: Takes a remark on shards that may belong to another source.
    """
    parts: dict[str, list[RowRange | None]] = {}
    places: dict[AnyPath, set[str]] = {}
    for manifest in here.values():
        source = manifest.source
        assert source is not None
        parts.setdefault(source.name, []).append(row_range(manifest))
        if source.path is None or "://" not in source.path:
            places.setdefault(folder if source.path is None else Path(source.path).parent, set()).add(source.name)
    for name, ranges in parts.items():
        yield from gaps(str(folder / name), sorted(ranges, key=lambda part: part or ()))
    embedded = {path.name.removesuffix(f"{BESIDE}{MANIFEST_SUFFIX}") for path in here}
    for place, known in places.items():
        try:
            files = [path for path in place.iterdir() if path.suffix in {Path(name).suffix for name in known}]
        except OSError:  # the data has been moved
            continue
        missing = [path for path in files if path.name not in known and shard_stem(path.name) not in embedded]
        series = set(map(_series, known))
        alike = sorted(str(path) for path in missing if _series(path.name) in series)
        others = sorted(str(path) for path in missing if _series(path.name) not in series)
        where = "" if place == folder else f" in {folder}"
        if alike:
            total = sum(_series(path.name) in series for path in files)
            count = "1 shard" if len(alike) == 1 else f"{len(alike)} shards"
            yield f"{alike[0]} has no sidecar{where} ({count} of {total} in that folder)"
        if others and place == folder:
            more = f", nor do {len(others) - 1} more" if len(others) > 1 else ""
            found.remarks.append(
                f"{others[0]} has no sidecar{more}; since the names of the shards that do are of another kind, it may "
                "be of another split or source."
            )


def _series(name: str) -> str:
    """Return a name without the numbers by which the shards of a source differ."""
    return re.sub(r"[0-9]+", "0", name)
