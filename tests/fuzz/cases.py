"""Inputs made of seeds: a folder of good files, of which one or two are damaged."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from llm2clip.store.verify import NAMES
from llm2clip.utils.manifests import MANIFEST_CHECKSUM, with_checksum
from tests.bad_input.documents import changed
from tests.damage import mutated


class Seeds:
    """The good files that a door reads.

    Args:
        folder: A folder for each sample.
    """

    def __init__(self, folder: Path) -> None:
        self.samples: list[dict[str, bytes]] = []
        for sample in sorted(folder.iterdir()):
            files = (path for path in sorted(sample.rglob("*")) if path.is_file())
            self.samples.append({path.relative_to(sample).as_posix(): path.read_bytes() for path in files})

    def case(self, number: int, folder: Path, unchanged: Sequence[str] = ()) -> list[str]:
        """Write the input of this number into a folder, which holds nothing or another input.

        Args:
            unchanged: Patterns of the names of files that are not damaged.

        Returns:
            What was changed.
        """
        generator = random.Random(number)
        files = dict(generator.choice(self.samples))
        damaged = [name for name in files if not any(fnmatch(name, pattern) for pattern in unchanged)]
        chosen = generator.sample(damaged, min(len(damaged), generator.choice((1, 1, 1, 1, 1, 2))))
        for name in chosen:
            files[name] = self._changed(name, files[name], generator)
        _write(folder, files)
        return chosen

    def _changed(self, name: str, content: bytes, generator: random.Random) -> bytes:
        is_list = name.endswith(".json")
        if (is_list or NAMES.fullmatch(Path(name).name)) and generator.random() < 0.7:
            document = changed(json.loads(content), generator.randrange(2**32))
            # Someone who writes a list of files by hand computes its checksum too; that of stored rows is trusted.
            if is_list and isinstance(document, dict) and MANIFEST_CHECKSUM in document and generator.random() < 0.8:
                document = with_checksum({key: value for key, value in document.items() if key != MANIFEST_CHECKSUM})
            return json.dumps(document).encode()
        other = generator.choice(list(generator.choice(self.samples).values()))
        for _ in range(generator.choice((1, 1, 1, 2, 4))):
            content = mutated(content, generator, other)
        return content


def _write(folder: Path, files: dict[str, bytes]) -> None:
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in there.keys() - files.keys():
        there[name].unlink()
    for name, content in files.items():
        path = folder / name
        if name not in there or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
