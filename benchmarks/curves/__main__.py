"""Measure and plot how costs grow with the work: `python -m benchmarks.curves [loss encode search]`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import results
from benchmarks.contest import ROOT, THREAD_VARIABLES
from benchmarks.curves.points import CURVES
from benchmarks.environments import versions_of
from benchmarks.worker import measure

# As in RESULTS.md.
THREADS = 1
FOLDER = Path(__file__).parent
POINTS = FOLDER.with_suffix(".jsonl")


def main(arguments: list[str] | None = None) -> None:
    """Measure the selected curves and plot them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("curves", nargs="*", metavar="CURVE", help=f"{', '.join(CURVES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="measure the first points only, as a trial")
    parser.add_argument("--output-dir", type=Path, help="another folder for curves.jsonl and the plots")
    parser.add_argument("--point", nargs=3, metavar=("CURVE", "LINE", "X"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.point:
        _measure_point(*options.point)
        return
    unknown = set(options.curves) - set(CURVES)
    if unknown:
        parser.error(f"there is no curve {', '.join(sorted(unknown))}; choose from {', '.join(CURVES)}.")
    points = options.output_dir / POINTS.name if options.output_dir else POINTS
    kept = points.read_text().splitlines() if points.exists() else []
    for name in options.curves or CURVES:
        lines = [json.dumps(entry) for entry in _measure_curve(name, options.quick)]
        kept = [line for line in kept if json.loads(line)["curve"] != name] + lines
        points.write_text("".join(f"{line}\n" for line in kept))
        _draw(name, [json.loads(line) for line in lines], options.output_dir or FOLDER)


def _measure_curve(name: str, quick: bool) -> list[results.Record]:
    curve = CURVES[name]
    found = []
    for line, contestant in curve.lines.items():
        for x in curve.quick if quick else curve.xs:
            if x > contestant.up_to:
                continue
            command = [sys.executable, "-m", "benchmarks.curves", "--point", name, line, str(x)]
            environment = {
                **os.environ,
                **dict.fromkeys(THREAD_VARIABLES, str(THREADS)),
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            answer = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            figures = json.loads(answer.stdout.splitlines()[-1])
            print(f"{name:8} {line:24} {x:>9,}  {figures}", file=sys.stderr)
            found.append(
                {
                    "curve": name,
                    "line": line,
                    "x": x,
                    "figures": figures,
                    "threads": THREADS,
                    "machine": results.machine("cpu"),
                    "date": datetime.date.today().isoformat(),
                    "commit": results.commit(),
                    "versions": versions_of(None),
                }
            )
    return found


def _measure_point(curve: str, line: str, x: str) -> None:
    import torch

    torch.set_num_threads(THREADS)
    _, figures = measure(CURVES[curve].lines[line].set_up(int(x)))
    print(json.dumps({metric: float(f"{value:.4g}") for metric, value in figures.items()}))


def _draw(name: str, entries: list[results.Record], folder: Path) -> None:
    from benchmarks.curves.plots import draw

    points: dict[str, list] = {}
    for entry in entries:
        points.setdefault(entry["line"], []).append((entry["x"], entry["figures"]))
    first = entries[0]
    place = f"{first['machine']}; {first['date']}, commit {first['commit']}"
    draw(name, points, place, folder / f"{name}.png")
    print(f"wrote {folder / f'{name}.png'}", file=sys.stderr)


if __name__ == "__main__":
    main()
