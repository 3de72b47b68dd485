"""Attack the commands with faults: `python -m tests.faults`; see docs/reliability.md."""

from __future__ import annotations

import argparse
import datetime
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import commit, machine
from tests.documents.shell import Shell
from tests.faults import record
from tests.faults.bench import Bench, can_mount
from tests.faults.commands import ATTACKED
from tests.faults.damage import Damage, judge_damage, make_damages
from tests.faults.inputs import write_inputs
from tests.faults.trials import Baseline, Trial, make_trials
from tests.faults.verdicts import Verdict, judge
from tests.loopback_hub import LoopbackHub

# How many times the trials of the profile `ci` are made.
PROFILES = {"ci": 1, "nightly": 5}
KILLS, FAULTS, DAMAGES = record.PARTS
Job = Trial | Damage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials of a profile; returns 1 if work was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--profile", choices=PROFILES, default="ci", help="nightly: five times the kills and faults")
    parser.add_argument("--seed", type=int, default=1, help="of the places that are struck")
    parser.add_argument("--only", nargs="+", choices=ATTACKED, default=list(ATTACKED), help="some of the commands")
    parser.add_argument("--parts", nargs="+", choices=record.PARTS, default=list(record.PARTS))
    parser.add_argument("--workers", type=int, default=2, help="commands that run at the same time")
    parser.add_argument("--folder", type=Path, help="kept folder of the runs; by default a temporary one")
    parser.add_argument("--record", action="store_true", help="store the record, and write it into the documents")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="llm2clip-faults-")) if options.folder is None else options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with LoopbackHub() as hub:
        verdicts = Attack(Bench(folder, hub), options).run()
    found = {
        "profile": options.profile,
        "seed": options.seed,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "machine": machine("cpu"),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "commands": record.count((command, part, verdict.outcome) for command, part, verdict in verdicts),
    }
    lost = [verdict for _, _, verdict in verdicts if verdict.outcome == "lost"]
    for verdict in lost:
        print(f"LOST {verdict.what}, seed {options.seed}: {verdict.reason}")
    print(record.summary(found))
    if options.record:
        record.write(found)
    if options.folder is None and not lost:
        shutil.rmtree(folder)
    return 1 if lost else 0


class Attack:
    """All trials of a run, by several workers, each with a shell of its own."""

    def __init__(self, bench: Bench, options: argparse.Namespace) -> None:
        self.bench, self.options = bench, options
        self.baselines: dict[str, Baseline] = {}
        self.verdicts: list[tuple[str, str, Verdict]] = []
        self.errors: list[BaseException] = []
        self.mounts = can_mount(bench.folder / "disk")

    def run(self) -> list[tuple[str, str, Verdict]]:
        """Measure the commands without faults and then with them; returns command, part and verdict."""
        write_inputs(self.bench.inputs)
        needed = _with_needs(self.options.only)
        with self.bench.shell() as shell:
            for command in needed:
                self.baselines[command] = baseline = self.bench.measure(shell, command)
                print(f"{command}: {len(baseline.changes)} changes, {baseline.total} bytes", file=sys.stderr)
        jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for command in needed:
            if command in self.options.only:
                for job in self._jobs(command):
                    jobs.put(job)
        threads = [threading.Thread(target=self._work, args=(jobs,)) for _ in range(self.options.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        return sorted(self.verdicts, key=lambda found: (needed.index(found[0]), found[1]))

    def _jobs(self, command: str) -> list[Job]:
        attacked, baseline, parts = ATTACKED[command], self.baselines[command], self.options.parts
        times = PROFILES[self.options.profile]
        kills, faults = attacked.kills * times, attacked.faults * times
        trials = make_trials(command, attacked, baseline, self.options.seed, kills, faults, self.mounts)
        damages = make_damages(command, self.bench.inputs / "made" / command)
        jobs: list[Job] = [*trials, *damages]
        return [job for job in jobs if _part(job) in parts]

    def _work(self, jobs: queue.SimpleQueue[Job]) -> None:
        try:
            with self.bench.shell() as shell:
                while not self.errors:
                    self._judge(shell, jobs.get_nowait())
        except queue.Empty:
            return
        except BaseException as error:
            self.errors.append(error)

    def _judge(self, shell: Shell, job: Job) -> None:
        baseline = self.baselines[job.command]
        verdict = (
            judge(self.bench, shell, job, baseline)
            if isinstance(job, Trial)
            else judge_damage(self.bench, shell, job, baseline, self.options.seed)
        )
        self.verdicts.append((job.command, _part(job), verdict))
        met = "" if verdict.struck else " (not met)"
        print(f"{verdict.outcome}{met}: {verdict.what} {verdict.reason}".rstrip(), file=sys.stderr, flush=True)


def _part(job: Job) -> str:
    if isinstance(job, Damage):
        return DAMAGES
    return KILLS if job.kind == "kill" else FAULTS


def _with_needs(commands: Sequence[str]) -> list[str]:
    """Return the commands, and those whose results they read, which come first."""
    needed: dict[str, None] = {}

    def add(command: str) -> None:
        for other in ATTACKED[command].needs:
            add(other)
        needed[command] = None

    for command in commands:
        add(command)
    return list(needed)


if __name__ == "__main__":
    sys.exit(main())
