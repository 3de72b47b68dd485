"""Faults by seed: where each one strikes."""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.faults.commands import ATTACKED
from tests.faults.content import Content
from tests.faults.injection import Change, Plan

Kind = Literal["kill", "full disk", "quota", "I/O error", "read-only", "small disk", "largest file", "connection"]
# In this order, again and again.
FAULTS: tuple[Kind, ...] = (
    *("full disk", "I/O error", "small disk", "I/O error", "quota"),
    *("full disk", "I/O error", "largest file", "small disk", "read-only"),
)
PLANS: dict[Kind, dict[str, Any]] = {
    "kill": {"mode": "kill"},
    "full disk": {"mode": "from", "error": errno.ENOSPC},
    "quota": {"mode": "from", "error": errno.EDQUOT},
    "I/O error": {"mode": "once", "error": errno.EIO},
    "read-only": {"mode": "from", "error": errno.EROFS},
    "connection": {"mode": "once", "error": errno.ECONNRESET},
}
# Changes that a full disk refuses.
REFUSED = ("write", "create", "mkdir", "allocate")
# Bytes of the smallest limit of files, which holds for the one that takes the messages too.
MESSAGES = 1000


@dataclass(frozen=True)
class Baseline:
    """An unbroken run.

    Attributes:
        content: What it has made.
        changes: The changes on the way.
        total, largest: Bytes of all its files, and of the largest.
        varying: Paths that two unbroken runs write differently.
    """

    content: Content
    changes: list[Change]
    total: int
    largest: int
    varying: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Trial:
    """A fault of a command.

    Attributes:
        number: Its number among those of the command, by which it can be repeated.
        change: The change that it strikes, if it strikes one.
        size: Bytes of the disk or of the largest file.
    """

    command: str
    number: int
    kind: Kind
    change: Change | None = None
    size: int = 0

    def __str__(self) -> str:
        place = f"{self.size} bytes" if self.change is None else "change {} ({} {})".format(*self.change)
        return f"{self.command}, trial {self.number}: {self.kind}, {place}"

    def plan(self, root: Path, log: Path) -> Plan:
        """Return what happens to the process."""
        limit = self.size if self.kind == "largest file" else None
        at = self.change.number if self.change else 0
        return Plan(str(root), str(log), at=at, file_size=limit, **PLANS.get(self.kind, {}))


def make_trials(name: str, baseline: Baseline, seed: int, times: int, can_mount: bool) -> list[Trial]:
    """Choose where a command is struck: by kinds of changes and by files, and then by chance.

    Args:
        times: How often its number of trials is made.
        can_mount: Whether small disks can be mounted; otherwise the system limits the largest file.
    """
    attacked, dice = ATTACKED[name], random.Random(f"{seed} {name}")
    kills, faults = attacked.kills * times, attacked.faults * times
    trials = [
        Trial(name, number, "kill", change)
        for number, change in enumerate(_spread(baseline.changes, kills, dice), start=1)
    ]
    for number in range(faults):
        kind = "connection" if attacked.sockets else FAULTS[number % len(FAULTS)]
        if kind == "small disk" and not can_mount:
            kind = "largest file"
        trials.append(_fault(name, kills + 1 + number, kind, baseline, dice))
    return trials


def _fault(name: str, number: int, kind: Kind, baseline: Baseline, dice: random.Random) -> Trial:
    share = dice.uniform(0.02, 0.98)
    if kind == "small disk":
        return Trial(name, number, kind, size=int(share * baseline.total))
    if kind == "largest file":
        return Trial(name, number, kind, size=max(MESSAGES, int(share * baseline.largest)))
    if kind == "read-only":
        return Trial(name, number, kind, baseline.changes[0])
    found = [change for change in baseline.changes if kind in ("I/O error", "connection") or change.kind in REFUSED]
    return Trial(name, number, kind, _spread(found, 1, dice)[0])


def _spread(changes: Sequence[Change], count: int, dice: random.Random) -> list[Change]:
    """Choose changes; all kinds are equally likely, and of a kind all files, whose logs have many changes."""
    groups: dict[str, dict[str, list[Change]]] = {}
    for change in changes:
        groups.setdefault(change.kind, {}).setdefault(change.path, []).append(change)
    chosen = []
    for _ in range(count):
        files = groups[dice.choice(sorted(groups))]
        chosen.append(dice.choice(files[dice.choice(sorted(files))]))
    return chosen
