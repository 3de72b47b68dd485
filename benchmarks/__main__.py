"""Run rows of the table: `python -m benchmarks [R1 R2 ...]`, or `make bench`."""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks import results
from benchmarks.contest import UnequalError, run_contest
from benchmarks.row import load_row, row_modules


def main(arguments: list[str] | None = None) -> int:
    """Run the selected rows, store their results and write the table.

    Returns:
        0; 1 if values differ or a contestant failed.
    """
    modules = row_modules()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(modules)}; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device that does the work")
    parser.add_argument("--table", action="store_true", help="only write RESULTS.md from the stored results")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.rows if name not in modules]
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; choose from {', '.join(modules)}.")
    if options.device == "cuda" and not _has_cuda():
        print("there is no CUDA device: the GPU rows are skipped.")
        return 0
    failures = []
    for name in () if options.table else options.rows or modules:
        row = load_row(modules[name])
        if options.device not in row.devices:
            continue
        for contest in row.contests(options.device):
            print(f"{row.id}  {row.work}: {contest.title}", file=sys.stderr)
            start = time.perf_counter()
            try:
                turns = run_contest(modules[name], options.device, contest)
            except (UnequalError, RuntimeError) as error:
                failures.append(f"{row.id}, {contest.title}: {error}")
                print(f"    {error}", file=sys.stderr)
                continue
            entry = results.record(row, contest, options.device, turns)
            results.write(entry)
            _report(entry, time.perf_counter() - start)
    rows = [load_row(module) for module in modules.values()]
    current = {
        (row.id, contest.title, device) for row in rows for device in row.devices for contest in row.contests(device)
    }
    newest = {key: entry for key, entry in results.read().items() if key in current}
    shortfalls = {row.id: row.shortfall for row in rows}
    results.TABLE.write_text(results.table(newest, shortfalls), encoding="utf-8")
    print(f"wrote {results.TABLE} from {results.RESULTS}", file=sys.stderr)
    for line in failures:
        print(f"FAILED  {line}", file=sys.stderr)
    return 1 if failures else 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _report(entry: results.Record, seconds: float) -> None:
    for name, figures in entry["figures"].items():
        shown = "  ".join(f"{metric} {results._quantity(metric, value)}" for metric, value in figures.items())
        print(f"    {name:32} {shown}", file=sys.stderr)
    for goal in entry["goals"]:
        verdict = "reached" if goal["ratio"] <= goal["at_most"] else "NOT REACHED"
        print(
            f"    {goal['metric']} against {goal['against']}: {goal['ratio']:.3f}, goal {goal['at_most']}: {verdict}",
            file=sys.stderr,
        )
    print(f"    ({seconds:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
