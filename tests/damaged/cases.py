"""Inputs: a folder of good files, of which one or two are wrong or damaged."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from llm2clip.files.manifests import MANIFEST_CHECKSUM, with_checksum
from llm2clip.store.verify import NAMES
from tests.damage import changed, mutated

Files = dict[str, bytes]


class Wrong(NamedTuple):
    """A file that is wrong in a way that is worth a line: readers that accept the sample have to refuse it.

    Attributes:
        change: The content, what makes it of the good one, or fields of a JSON file that are replaced.
        by: Whether all of them have to, or any of them.
    """

    sample: str
    file: str
    change: bytes | Callable[[bytes], bytes] | dict[str, Any]
    by: Callable[[Iterable[bool]], bool] = all

    def content(self, good: bytes) -> bytes:
        """Return the wrong content."""
        if isinstance(self.change, dict):
            return json.dumps(json.loads(good) | self.change).encode()
        return self.change if isinstance(self.change, bytes) else self.change(good)


class Door(NamedTuple):
    """A reader of files.

    Attributes:
        make: Writes good files, a folder for each sample.
        read: Returns the calls that read the files of a folder; each returns what is read.
        wrong: Files that have to be refused.
        limit: Seconds for an input.
        unchanged: Patterns of the names of files that are not damaged.
        names: What a message may name besides the files.
        several: Whether some readers are for some samples; otherwise all of them read the good files.
        checked: Whether the first reader compares checksums: where it accepts other bytes, all read what was written.
        unchecked: Patterns of the names of files without a checksum.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Sequence[Callable[[], Any]]]
    wrong: tuple[Wrong, ...] = ()
    limit: float = 20.0
    unchanged: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    several: bool = False
    checked: bool = False
    unchecked: tuple[str, ...] = ()


class Case(NamedTuple):
    """An input.

    Attributes:
        changed: The names of the files that differ from those of the sample.
        refused_by: Whether all readers have to refuse it, or any of them; None if none has to.
        by_bytes: Whether bytes were damaged, rather than values of a document with a checksum that fits.
    """

    sample: str
    files: Files
    changed: list[str]
    refused_by: Callable[[Iterable[bool]], bool] | None = None
    by_bytes: bool = False

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether a changed file has such a name."""
        return any(fnmatch(name, pattern) for name in self.changed for pattern in patterns)


class Cases:
    """The inputs of a door, by number: the wrong files have negative ones, and the others are drawn by them.

    Args:
        work: Has the good files, in `good`.
    """

    def __init__(self, door: Door, work: Path) -> None:
        self.door = door
        self.samples = {sample.name: _files(sample) for sample in sorted((work / "good").iterdir())}

    def case(self, number: int) -> Case:
        """Return the input of this number."""
        if number < 0:
            wrong = self.door.wrong[number]
            good = self.samples[wrong.sample]
            files = good | {wrong.file: wrong.content(good[wrong.file])}
            return Case(wrong.sample, files, [wrong.file], wrong.by)
        generator = random.Random(number)
        sample = generator.choice([*self.samples])
        files = dict(self.samples[sample])
        damaged = [name for name in files if not any(fnmatch(name, pattern) for pattern in self.door.unchanged)]
        chosen = generator.sample(damaged, min(len(damaged), generator.choice((1, 1, 1, 1, 1, 2))))
        by_bytes = True
        for name in chosen:
            files[name], of_bytes = self._damaged(name, files[name], generator)
            by_bytes &= of_bytes
        return Case(sample, files, chosen, by_bytes=by_bytes)

    def _damaged(self, name: str, content: bytes, generator: random.Random) -> tuple[bytes, bool]:
        is_list = name.endswith(".json")
        if (is_list or NAMES.fullmatch(Path(name).name)) and generator.random() < 0.7:
            document = changed(json.loads(content), generator)
            # Someone who writes a list of files by hand computes its checksum too; that of stored rows is trusted.
            if is_list and isinstance(document, dict) and MANIFEST_CHECKSUM in document and generator.random() < 0.8:
                document = with_checksum({key: value for key, value in document.items() if key != MANIFEST_CHECKSUM})
            return json.dumps(document).encode(), False
        other = generator.choice([b"", *generator.choice([*self.samples.values()]).values()])
        for _ in range(generator.choice((1, 1, 1, 2, 4))):
            content = mutated(content, generator, other)
        return content, True


def _files(folder: Path) -> Files:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write(folder: Path, files: Files) -> None:
    """Let a folder, which may have another input, have these files and no others."""
    for name in _files(folder).keys() - files.keys():
        (folder / name).unlink()
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
