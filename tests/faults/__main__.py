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
from pathlib import Path

from benchmarks.results import commit, machine
from tests.faults import record
from tests.faults.bench import Bench, can_mount
from tests.faults.commands import ATTACKED
from tests.faults.damage import Damage, make_damages
from tests.faults.inputs import write_inputs
from tests.faults.trials import Baseline, Trial, make_trials
from tests.faults.verdicts import Verdict, judge
from tests.loopback_hub import LoopbackHub

# How many times the trials of the profile `ci` are made.
PROFILES = {"ci": 1, "nightly": 5}
KILLS, FAULTS, DAMAGES = record.PARTS
Job = Trial | Damage


def main() -> int:
    """Run the trials of a profile; returns 1 if work was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--profile", choices=PROFILES, default="ci", help="nightly: five times the kills and faults")
    parser.add_argument("--seed", type=int, default=1, help="of the places that are struck")
    parser.add_argument("--only", nargs="+", choices=ATTACKED, default=list(ATTACKED), help="some of the commands")
    parser.add_argument("--parts", nargs="+", choices=record.PARTS, default=list(record.PARTS))
    parser.add_argument("--workers", type=int, default=2, help="commands that run at the same time")
    parser.add_argument("--folder", type=Path, help="kept folder of the runs; by default a temporary one")
    parser.add_argument("--record", action="store_true", help="store the record, and write it into the documents")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="llm2clip-faults-")) if options.folder is None else options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with LoopbackHub() as hub:
        verdicts = attack(Bench(folder, hub), options)
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


def attack(bench: Bench, options: argparse.Namespace) -> list[tuple[str, str, Verdict]]:
    """Measure the commands without faults and then with them, by several workers; returns command, part, verdict."""
    write_inputs(bench.inputs)
    mounts = can_mount(bench.folder / "disk")
    # Those whose results a command reads come before it.
    needed = list(dict.fromkeys(name for command in options.only for name in _with_needs(command)))
    baselines: dict[str, Baseline] = {}
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    with bench.shell() as shell:
        for command in needed:
            baselines[command] = baseline = bench.measure(shell, command)
            print(f"{command}: {len(baseline.changes)} changes, {baseline.total} bytes", file=sys.stderr)
    for command in (command for command in needed if command in options.only):
        trials = make_trials(command, baselines[command], options.seed, PROFILES[options.profile], mounts)
        damages = make_damages(command, bench.inputs / "made" / command, options.seed)
        for job in (job for job in (*trials, *damages) if _part(job) in options.parts):
            jobs.put(job)
    verdicts: list[tuple[str, str, Verdict]] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with bench.shell() as shell:
                while not errors:
                    job = jobs.get_nowait()
                    verdict = judge(bench, shell, job, baselines[job.command])
                    verdicts.append((job.command, _part(job), verdict))
                    print(f"{verdict.outcome}: {verdict.what} {verdict.reason}", file=sys.stderr, flush=True)
        except queue.Empty:
            return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(options.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sorted(verdicts, key=lambda found: (needed.index(found[0]), found[1]))


def _part(job: Job) -> str:
    return DAMAGES if isinstance(job, Damage) else KILLS if job.kind == "kill" else FAULTS


def _with_needs(command: str) -> list[str]:
    return [*(name for other in ATTACKED[command].needs for name in _with_needs(other)), command]


if __name__ == "__main__":
    sys.exit(main())
