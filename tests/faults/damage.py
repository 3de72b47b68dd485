"""Damage at rest: a flipped bit, a cut and a part of zeros in every type of file that the commands write."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from llm2clip.files.manifests import EDITED
from tests.damage import mutated
from tests.faults.commands import ATTACKED, OUT, WORK
from tests.faults.content import IGNORED


@dataclass(frozen=True)
class Damage:
    """A file of a finished result that is damaged; `number` is that among the damages of the command."""

    command: str
    number: int
    kind: str
    path: str
    seed: int

    def __str__(self) -> str:
        return f"{self.command}, damage {self.number}: {self.kind} in {self.path}"

    def strike(self, folder: Path) -> None:
        """Damage the file of a copy of the result."""
        path, generator = folder / WORK / self.path, random.Random(f"{self.seed} {self}")
        good = path.read_bytes()
        for _ in range(1000):
            if (data := mutated(good, generator, kind=self.kind)) != good:  # a part of zeros may have been one
                break
        path.write_bytes(data)

    @property
    def checked(self) -> Path:
        """The folder that is verified: that of the result, or of a checkpoint or of states."""
        parts = Path(self.path).parts
        if parts[0] != Path(OUT).name:
            return Path(WORK, *parts[:2])
        return Path(OUT, *parts[1:2]) if len(parts) > 2 and parts[1].startswith("checkpoint-") else Path(OUT)


def make_damages(command: str, folder: Path, seed: int) -> list[Damage]:
    """Choose one file of each type of a result and of each folder that is verified, and all kinds of damage for it.

    Args:
        folder: The folder of the unbroken run.
    """
    chosen: dict[tuple[str, str], Damage] = {}
    for path in sorted((folder / WORK).rglob("*")) if ATTACKED[command].damaged else ():
        if path.is_file() and path.stat().st_size and path.name not in EDITED and not IGNORED.fullmatch(path.name):
            name = path.relative_to(folder / WORK).as_posix()
            damage = Damage(command, 0, "", name, seed)
            chosen.setdefault((_type(str(damage.checked)), _type(path.name)), damage)
    pairs = [(damage.path, kind) for damage in chosen.values() for kind in ("flip", "cut", "zero")]
    return [Damage(command, number, kind, path, seed) for number, (path, kind) in enumerate(pairs, start=1)]


def _type(name: str) -> str:
    """Names that differ in numbers alone, as those of shards do, are of one type; so is code."""
    return "code" if name.endswith(".py") else re.sub(r"[0-9a-f-]{8,}|\d+", "N", name)
