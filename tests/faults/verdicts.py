"""What has become of a command or result that was struck: equal to an unbroken run, clearly refused, or lost."""

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
from tests.faults.damage import Damage
from tests.faults.trials import Baseline, Trial

KILLED, SHOWN = -9, 4


@dataclass(frozen=True)
class Verdict:
    """The outcome of a trial; `reason` is why it is lost, or the words of the refusal."""

    what: str
    outcome: Literal["equal", "refused", "lost"]
    reason: str = ""


def judge(bench: Bench, shell: Shell, job: Trial | Damage, baseline: Baseline) -> Verdict:
    """Strike a command or its result, and use it again; the folder is deleted unless something is lost."""
    folder = bench.folder / str(job).partition(":")[0].replace(", ", "-").replace(" ", "-")
    disk: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(job, Damage):
        shutil.copytree(bench.inputs / "made" / job.command / WORK, folder / WORK)
    else:
        (folder / WORK).mkdir(parents=True)
        disk = small_disk(folder / WORK, job.size) if job.kind == "small disk" else disk
    with disk:
        struck = _damage if isinstance(job, Damage) else _strike
        verdict = struck(bench, shell, job, baseline, folder)  # type: ignore[operator]
        if verdict.outcome == "lost":
            shutil.copytree(folder / WORK, folder / "kept", symlinks=True)
            return Verdict(verdict.what, "lost", f"{verdict.reason} (kept in {folder / 'kept'})")
    shutil.rmtree(folder)
    return verdict


def _strike(bench: Bench, shell: Shell, trial: Trial, baseline: Baseline, folder: Path) -> Verdict:
    def lost(reason: str) -> Verdict:
        return Verdict(str(trial), "lost", reason)

    first = bench.run(shell, trial.command, folder, trial.plan(folder / WORK, folder / LOG))
    if trial.kind == "small disk":
        enlarge(folder / WORK)
    found = bench.content(trial.command, folder)
    if first.returncode == 0:
        # It was not met, since threads may write in another order; or what failed does not matter.
        wrong = _differing(found, baseline)
        return lost(f"exit 0, but {_some(wrong)}") if wrong else Verdict(str(trial), "equal")
    if first.returncode != KILLED and not is_clear(first):
        return lost(f"no clear message: {last_words(first)}")
    if (first.returncode == KILLED) != (trial.kind == "kill"):
        return lost(last_words(first))
    halves = _halves(trial.command, folder, found, baseline)
    if halves:
        return lost(f"a reader takes for whole what is not: {_some(halves)}")
    second = bench.run(shell, trial.command, folder, again=True)
    wrong = _differing(bench.content(trial.command, folder), baseline)
    if second.returncode == 0 and not wrong:
        return Verdict(str(trial), "equal", "" if trial.kind == "kill" else last_words(first))
    # With its whole result there, a command has reason to refuse a second run.
    if is_clear(second) and not wrong and ATTACKED[trial.command].is_whole(folder / OUT):
        return Verdict(str(trial), "refused", last_words(second))
    return lost(f"the same command again: {last_words(second)}; {_some(wrong)}")


def _damage(bench: Bench, shell: Shell, damage: Damage, baseline: Baseline, folder: Path) -> Verdict:
    """Damage a file and look at the folder with `llm2clip verify` and with the command that made it."""
    damage.strike(folder)
    checked = shell.run(f"llm2clip verify {folder / damage.checked}", folder)
    said = checked.stderr + checked.stdout
    if checked.returncode and Path(damage.path).name in said and "Traceback" not in said:
        return Verdict(str(damage), "refused", last_words(checked))
    reason = f"verify: {last_words(checked)}"
    found = _differing(bench.content(damage.command, folder), baseline)
    if found and ATTACKED[damage.command].repeats:
        again = bench.run(shell, damage.command, folder, again=True)
        if is_clear(again):
            return Verdict(str(damage), "refused", last_words(again))
        reason += f"; the command again: {last_words(again)}"
        found = _differing(bench.content(damage.command, folder), baseline) if again.returncode == 0 else found
    return Verdict(str(damage), "lost", f"{reason}; {_some(found)}") if found else Verdict(str(damage), "equal")


def _differing(found: Content, baseline: Baseline) -> list[str]:
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
        for line in _differing(found, baseline)
        if any(fnmatch(line.split(" ")[0], f"out/{pattern}") for pattern in attacked.result)
        and not line.endswith(" is left over")
        and not found.get(line.split(" ")[0], "").startswith(UNREADABLE)
    ]


def _some(lines: list[str]) -> str:
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(lines[:SHOWN]) + more if lines else "equal"
