"""Measure how costs grow with a data set: `python -m benchmarks.scale embed read --captions 1000000`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.environments import versions_of
from benchmarks.scale import page
from benchmarks.scale.alignment import AlignTrial, align
from benchmarks.scale.data import clean
from benchmarks.scale.embedding import ENGINES, Trial, embed
from benchmarks.scale.reading import ReadTrial, read
from benchmarks.scale.tables import RESULTS

STEPS = ("embed", "read", "align")


def main(arguments: list[str] | None = None) -> None:
    """Measure, append what was measured to scale.jsonl, and write the tables of docs/scaling.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument(
        "steps",
        nargs="*",
        metavar="STEP",
        help=f"what is measured: {', '.join(STEPS)}; without any, only the tables of docs/scaling.md are written",
    )
    parser.add_argument(
        "--captions",
        type=int,
        default=100_000,
        help="size of the data set, or pairs that are aligned; 10M need 36 GB of disk, aligned 28 GB",
    )
    parser.add_argument("--processes", type=int, default=2, help="processes, or actors of Ray")
    parser.add_argument("--engine", choices=ENGINES, default="processes")
    parser.add_argument("--workers", type=int, default=0, help="read: DataLoader workers of each process")
    parser.add_argument("--threads", type=int, default=2, help="align: threads of its process")
    parser.add_argument("--kills", type=int, default=0, help="how often all processes are killed on the way")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/scale"), help="folder of the data, which is deleted at the end"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder, for the next run")
    parser.add_argument("--record", type=Path, default=RESULTS, help="another file for the figures; the page stays")
    options = parser.parse_args(arguments)
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"there is no step {', '.join(sorted(unknown))}; choose from {', '.join(STEPS)}.")
    folder = options.folder.absolute()
    try:
        for step in options.steps:
            figures = _measure(step, folder, options)
            print(json.dumps({"step": step, **figures}, indent=2), file=sys.stderr)
            with options.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures, **_circumstances()}) + "\n")
    finally:
        if not options.keep:
            clean(folder)
    if options.record == RESULTS:
        page.write()


def _measure(step: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    if step == "embed":
        return embed(folder, Trial(options.captions, options.processes, options.engine, options.kills))
    if step == "align":
        return align(folder, AlignTrial(options.captions, options.threads))
    return read(folder, ReadTrial(options.captions, options.processes, options.workers))


def _circumstances() -> dict[str, Any]:
    return {
        "machine": results.machine("cpu"),
        "load": round(os.getloadavg()[1], 2),
        "date": datetime.date.today().isoformat(),
        "commit": results.commit(),
        "versions": versions_of(None),
    }


if __name__ == "__main__":
    main()
