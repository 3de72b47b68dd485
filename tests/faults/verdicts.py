"""What has become of a command that was struck: equal to an unbroken run, refused in clear words, or lost."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from tests.documents.shell import Shell
from tests.faults.bench import LOG, Bench, enlarge, is_clear, last_words, small_disk
from tests.faults.commands import ATTACKED, OUT, WORK
from tests.faults.content import UNREADABLE, Content, differences
from tests.faults.trials import Baseline, Trial

Outcome = Literal["equal", "refused", "lost"]
KILLED, SHOWN = -9, 4


@dataclass(frozen=True)
class Verdict:
    """The outcome of a trial.

    Attributes:
        reason: Why it is lost, or the words of the refusal.
        struck: Whether the fault was met at all: threads may write in another order.
    """

    what: str
    outcome: Outcome
    reason: str = ""
    struck: bool = True


def judge(bench: Bench, shell: Shell, trial: Trial, baseline: Baseline) -> Verdict:
    """Strike a command and run it again; the folder is deleted unless something is lost."""
    folder = bench.folder / f"{trial.command}-{trial.number}"
    (folder / WORK).mkdir(parents=True)
    disk = small_disk(folder / WORK, trial.size) if trial.kind == "small disk" else contextlib.nullcontext()
    with disk:
        verdict = _judge(bench, shell, trial, baseline, folder)
        if verdict.outcome == "lost" and trial.kind == "small disk":
            shutil.copytree(folder / WORK, folder / "kept", symlinks=True)
    if verdict.outcome != "lost":
        shutil.rmtree(folder)
    return verdict


def _judge(bench: Bench, shell: Shell, trial: Trial, baseline: Baseline, folder: Path) -> Verdict:
    def lost(reason: str) -> Verdict:
        return Verdict(str(trial), "lost", f"{reason} (kept in {folder})")

    first = bench.run(shell, trial.command, folder, trial.plan(folder / WORK, folder / LOG))
    if trial.kind == "small disk":
        enlarge(folder / WORK)
    found = bench.content(trial.command, folder)
    if first.code == 0:
        # It was not met, or what failed does not matter.
        wrong = differing(found, baseline)
        struck = trial.change is not None and (folder / LOG).stat().st_size > 0
        return lost(f"exit 0, but {some(wrong)}") if wrong else Verdict(str(trial), "equal", "", struck)
    if first.code != KILLED and not is_clear(first):
        return lost(f"no clear message: {last_words(first)}")
    if (first.code == KILLED) != (trial.kind == "kill"):
        return lost(last_words(first))
    halves = _halves(trial.command, folder, found, baseline)
    if halves:
        return lost(f"a reader takes for whole what is not: {some(halves)}")
    second = bench.run(shell, trial.command, folder, again=True)
    wrong = differing(bench.content(trial.command, folder), baseline)
    if second.code == 0 and not wrong:
        return Verdict(str(trial), "equal", "" if trial.kind == "kill" else last_words(first))
    # With its whole result there, a command has reason to refuse a second run.
    if is_clear(second) and not wrong and ATTACKED[trial.command].is_whole(folder / OUT):
        return Verdict(str(trial), "refused", last_words(second))
    return lost(f"the same command again: {last_words(second)}; {some(wrong)}")


def differing(found: Content, baseline: Baseline) -> list[str]:
    """Return the paths that differ from an unbroken run; see [`differences`]."""
    return [
        line
        for line in differences(found, baseline.content)
        if not (line.endswith(" differs") and line.split(" ")[0] in baseline.varying)
    ]


def _halves(command: str, folder: Path, found: Content, baseline: Baseline) -> list[str]:
    """What differs in a result that a reader takes for whole; what no reader can open counts as refused."""
    attacked = ATTACKED[command]
    if attacked.sockets or not attacked.is_whole(folder / OUT):
        return []
    return [
        line
        for line in differing(found, baseline)
        if any(fnmatch(line.split(" ")[0], f"out/{pattern}") for pattern in attacked.result)
        and not line.endswith(" is left over")
        and not found.get(line.split(" ")[0], "").startswith(UNREADABLE)
    ]


def some(lines: list[str]) -> str:
    """Return the first lines."""
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(lines[:SHOWN]) + more if lines else "equal"
