"""Damage at rest: a flipped bit, a cut and a page of zeros in every type of file that the commands write."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm2clip.utils.manifests import EDITED
from tests.documents.shell import Shell
from tests.faults.bench import Bench, is_clear, last_words
from tests.faults.commands import ATTACKED, OUT, WORK
from tests.faults.content import IGNORED
from tests.faults.trials import Baseline
from tests.faults.verdicts import Verdict, differing, some

PAGE = 4096


def flip(data: bytearray, dice: random.Random) -> None:
    """Flip one bit."""
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def cut(data: bytearray, dice: random.Random) -> None:
    """Cut the end off."""
    del data[dice.randrange(len(data)) :]


def zero(data: bytearray, dice: random.Random) -> None:
    """Fill a page with zeros."""
    start = dice.randrange(0, len(data), PAGE)
    data[start : start + PAGE] = bytes(len(data[start : start + PAGE]))


DAMAGES: dict[str, Callable[[bytearray, random.Random], None]] = {"flip": flip, "cut": cut, "zero": zero}


@dataclass(frozen=True)
class Damage:
    """A file of a finished result that is damaged; `number` is that among the damages of the command."""

    command: str
    number: int
    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.command}, damage {self.number}: {self.kind} in {self.path}"


def make_damages(command: str, folder: Path) -> list[Damage]:
    """Choose one file of each type of a result and of each folder that is verified, and all kinds of damage for it.

    Args:
        folder: The folder of the unbroken run.
    """
    if not ATTACKED[command].damaged:
        return []
    chosen: dict[tuple[str, str], str] = {}
    for path in sorted((folder / WORK).rglob("*")):
        if path.is_file() and path.stat().st_size and path.name not in {*IGNORED, *EDITED}:
            name = path.relative_to(folder / WORK).as_posix()
            chosen.setdefault((file_type(str(checked_folder(name))), file_type(path.name)), name)
    pairs = [(path, kind) for path in chosen.values() for kind in DAMAGES]
    return [Damage(command, number, kind, path) for number, (path, kind) in enumerate(pairs, start=1)]


def file_type(name: str) -> str:
    """Return the type of a file: names that differ in numbers alone, as those of shards do, are of one; so is code."""
    return "code" if name.endswith(".py") else re.sub(r"[0-9a-f-]{8,}|\d+", "N", name)


def judge_damage(bench: Bench, shell: Shell, damage: Damage, baseline: Baseline, seed: int) -> Verdict:
    """Damage a file and look at the folder with `llm2clip verify` and with the command that made it."""
    folder = bench.folder / f"{damage.command}-damage-{damage.number}"
    shutil.copytree(bench.inputs / "made" / damage.command / WORK, folder / WORK)
    _damage(folder / WORK / damage.path, damage.kind, random.Random(f"{seed} {damage}"))
    verdict = _judge(bench, shell, damage, baseline, folder)
    if verdict.outcome != "lost":
        shutil.rmtree(folder)
    return verdict


def _damage(path: Path, kind: str, dice: random.Random) -> None:
    before = path.read_bytes()
    data = bytearray(before)
    while data == before:  # a page of zeros may have been one
        DAMAGES[kind](data, dice)
        if kind == "zero" and not any(before):
            break
    path.write_bytes(data)


def _judge(bench: Bench, shell: Shell, damage: Damage, baseline: Baseline, folder: Path) -> Verdict:
    checked = shell.run(f"llm2clip verify {folder / checked_folder(damage.path)}", folder)
    said = checked.errors + checked.output
    if checked.code and Path(damage.path).name in said and "Traceback" not in said:
        return Verdict(str(damage), "refused", last_words(checked))
    found = differing(bench.content(damage.command, folder), baseline)
    if not found:
        return Verdict(str(damage), "equal")
    reason = f"verify: {last_words(checked)}"
    if ATTACKED[damage.command].repeats:
        again = bench.run(shell, damage.command, folder, again=True)
        if again.code and is_clear(again):
            return Verdict(str(damage), "refused", last_words(again))
        found = differing(bench.content(damage.command, folder), baseline)
        if again.code == 0 and not found:
            return Verdict(str(damage), "equal")
        reason += f"; the command again: {last_words(again)}"
    return Verdict(str(damage), "lost", f"{reason}; {some(found)} (kept in {folder})")


def checked_folder(path: str) -> Path:
    """Return the folder of a damaged file that is verified: that of the result, or of a checkpoint or of states."""
    parts: Sequence[str] = Path(path).parts
    if parts[0] != Path(OUT).name:
        return Path(WORK, *parts[:2])
    return Path(OUT, *parts[1:2]) if len(parts) > 2 and parts[1].startswith("checkpoint-") else Path(OUT)
