"""`python -m tests.damaged`: let readers read damaged files, and store the inputs that fail."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

from tests.damaged.doors import DOORS
from tests.damaged.run import run


def main() -> int:
    """Run the command; the exit status is 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.damaged")
    parser.add_argument("--draws", type=int, default=100, help="inputs of each door")
    parser.add_argument("--first", type=int, default=0, help="number of the first one; the same numbers are the same")
    parser.add_argument("--doors", nargs="*", choices=DOORS, default=list(DOORS), help="default: all of them")
    parser.add_argument("--failures", type=Path, default=Path("build/damaged"), help="where failing inputs are stored")
    parser.add_argument("--json", type=Path, help="file for what was found")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(prefix="llm2clip-damaged-") as work:
        for door in options.doors:
            found[door] = run(door, options.draws, Path(work, door), options.failures, options.first)
            print(f"{door}: {found[door].tried} inputs, {found[door].refused} refused", flush=True)
            for place, reason in found[door].failures.items():
                print(f"FAILED {place}: {reason.splitlines()[0]}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({door: asdict(result) for door, result in found.items()}))
    return any(result.failures for result in found.values())


if __name__ == "__main__":
    sys.exit(main())
