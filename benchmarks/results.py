"""Store results, one line of JSON per contest in results.jsonl, and write the table of the newest ones."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.contest import ROOT, Measurements, ratio, summarise
from benchmarks.environments import versions_of
from benchmarks.row import OURS, Contest, Row

RESULTS = Path(__file__).with_name("results.jsonl")
TABLE = Path(__file__).with_name("RESULTS.md")
# Runs of the same commit differ by a few per cent; a change of 20% must be reported.
SLOWER = 1.12
Record = dict[str, Any]


def record(row: Row, contest: Contest, device: str, turns: Measurements) -> Record:
    """Return the record of a contest."""
    environments, goals = {entry.environment for entry in contest.contestants.values()}, []
    for goal in contest.goals:
        # CPU time does not measure the work of a GPU.
        metric = "wall" if device != "cpu" and goal.metric == "cpu" else goal.metric
        measured = round(ratio(turns, goal.against, metric), 4)
        goals.append({"against": goal.against, "metric": metric, "ratio": measured, "at_most": goal.at_most})
    return {
        "row": row.id,
        "work": row.work,
        "contest": contest.title,
        "device": device,
        "machine": machine(device),
        "load": round(os.getloadavg()[1], 2),
        "threads": contest.threads,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": versions_of(None),
        "peers": {name: versions_of(name) for name in sorted(environments - {None})},
        "limits": [name for name, contestant in contest.contestants.items() if contestant.is_limit],
        "note": contest.note,
        "figures": {
            name: {metric: float(f"{value:.4g}") for metric, value in figures.items()}
            for name, figures in summarise(turns).items()
        },
        "goals": goals,
    }


def machine(device: str) -> str:
    """Describe the processor, or the GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{', '.join(sorted(names)) or platform.machine()}, {os.cpu_count()} threads, {memory:.0f} GiB"


def commit() -> str:
    """Return the current commit, with a plus if the working tree differs from it."""
    return _git("describe", "--always", "--dirty=+", "--exclude=*").strip() or "unknown"


def _git(*arguments: str) -> str:
    """Return the output of git; an empty string outside a checkout."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def read(lines: Iterable[str]) -> dict[tuple[str, str, str], Record]:
    """Return the newest record of each contest, by row, contest and device."""
    newest = {}
    for line in lines:
        if line.strip():
            entry = json.loads(line)
            newest[entry["row"], entry["contest"], entry["device"]] = entry
    return newest


def lines() -> list[str]:
    """Return the lines of results.jsonl."""
    return RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else []


def committed(machine: str) -> dict[tuple[str, str, str], Record]:
    """Return the newest committed records of a machine; none outside a checkout."""
    found = _git("show", "HEAD:./benchmarks/results.jsonl").splitlines()
    return read(line for line in found if line.strip() and json.loads(line)["machine"] == machine)


def append(entry: Record) -> None:
    """Append a record to the file."""
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def worse(entry: Record, before: Record | None) -> list[str]:
    """Describe the ratios that have become worse since the previous record."""
    if before is None or before["machine"] != entry["machine"]:
        return []
    old = {(goal["against"], goal["metric"]): goal["ratio"] for goal in before["goals"]}
    found = []
    for goal in entry["goals"]:
        was = old.get((goal["against"], goal["metric"]))
        if was is not None and goal["ratio"] > was * SLOWER:
            found.append(f"{goal['metric']} against {goal['against']} was {_number(was)} × in {before['commit']}")
    return found


def table(
    records: dict[tuple[str, str, str], Record],
    before: dict[tuple[str, str, str], Record],
    shortfalls: dict[str, str],
) -> str:
    """Return the text of RESULTS.md.

    Args:
        records: The newest record of each contest.
        before: Previous records, which are compared if they are from the same machine.
        shortfalls: Why a row misses its goal and what was tried, by row.
    """
    ordered = sorted(records.items(), key=lambda item: (item[0][2], int(item[0][0][1:]), item[0][1]))
    parts = [
        "# Benchmarks against other tools\n",
        "Generated by `make bench` (`make bench-gpu` on a CUDA GPU); do not edit. Every line is one run: the values "
        "of all contestants are compared first; then the contestants take turns, each in its own process and, unless "
        "stated otherwise, with one thread. *cpu* is the median of the seconds of all threads; *memory* is the peak "
        "increase during the work in a fresh process. The ratio is ours / theirs (smaller is better); the goal is "
        "the largest ratio that we accept. A *limit* is a lower bound of the cost, measured in the same run.\n",
        "🟢 reached · 🟡 not reached (see the end) · 🔴 more than "
        f"{SLOWER - 1:.0%} worse than the last committed result\n",
    ]
    for device in dict.fromkeys(key[2] for key, _ in ordered):
        parts.append(f"## {'CUDA' if device == 'cuda' else 'CPU'}\n")
        parts.append("| | row | work | what | ours | against | theirs | ratio | goal |")
        parts.append("| --- | --- | --- | --- | ---: | --- | ---: | ---: | ---: |")
        for key, entry in ordered:
            if key[2] == device:
                parts += _lines(entry, worse(entry, before.get(key)))
        parts.append("")
    regressions = [f"{key[0]}, {key[1]}: {text}" for key, entry in ordered for text in worse(entry, before.get(key))]
    if regressions:
        parts += ["## Worse than the last committed results\n", *(f"- 🔴 {line}" for line in regressions), ""]
    missed = {key[0] for key, entry in ordered for goal in entry["goals"] if goal["ratio"] > goal["at_most"]}
    if missed:
        parts.append("## Not reached\n")
        for row in sorted(missed, key=lambda name: int(name[1:])):
            parts.append(f"- {row}: {shortfalls.get(row) or 'no reason is given yet.'}")
        parts.append("")
    notes = [f"- {key[0]}, {key[1]}: {entry['note']}" for key, entry in ordered if entry["note"]]
    if notes:
        parts += ["## Notes\n", *notes, ""]
    parts += ["## Where and when\n", *_provenance(ordered), ""]
    return "\n".join(parts)


def _lines(entry: Record, regressions: list[str]) -> list[str]:
    """Return the table lines of a contest: its goals, and the limits that are not goals."""
    lines, metric = [], "cpu" if entry["device"] == "cpu" else "wall"
    aims = {goal["against"] for goal in entry["goals"]}
    times = {name: figures[metric] for name, figures in entry["figures"].items()}
    limits = [
        {"against": name, "metric": metric, "ratio": times[OURS] / times[name], "at_most": None}
        for name in entry["limits"]
        if name not in aims
    ]
    for goal in [*entry["goals"], *limits]:
        against, metric, at_most = goal["against"], goal["metric"], goal["at_most"]
        reached = at_most is not None and goal["ratio"] <= at_most
        mark = "🔴" if any(text.startswith(f"{metric} against {against} ") for text in regressions) else ""
        mark = mark or ("🟢" if reached else "🟡" if at_most is not None else "")
        name = f"*limit:* {against}" if against in entry["limits"] else against
        mine, theirs = entry["figures"][OURS][metric], entry["figures"][against][metric]
        threads = "" if entry["threads"] == 1 else f", {entry['threads']} threads"
        lines.append(
            f"| {mark} | {entry['row']} | {entry['work']}: {entry['contest']}{threads} | {metric} | "
            f"{_quantity(metric, mine)} | {name} | {_quantity(metric, theirs)} | {_number(goal['ratio'])} | "
            f"{'' if at_most is None else f'≤ {_number(at_most)}'} |"
        )
    return lines


def _provenance(ordered: list[tuple[tuple[str, str, str], Record]]) -> list[str]:
    """List machine, date, commit and versions, with the rows that were measured there."""
    groups: dict[str, list[str]] = {}
    for (row, _, _), entry in ordered:
        place = f"{entry['machine']}, {entry['date']}, commit {entry['commit']}; {_listed(entry['versions'])}"
        for peer, versions in entry.get("peers", {}).items():
            place += f"; {peer} in an environment with {_listed(versions)}"
        rows = groups.setdefault(place, [])
        if row not in rows:
            rows.append(row)
    return [f"- {', '.join(rows)}: {place}." for place, rows in groups.items()]


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def _quantity(metric: str, value: float) -> str:
    if metric in ("cpu", "wall"):
        return f"{value:.3g} s" if value >= 0.1 else f"{value * 1000:.3g} ms"
    if metric in ("memory", "bytes"):
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:.4g}"
