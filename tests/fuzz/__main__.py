"""`python -m tests.fuzz`: damage files for so many seconds; `--replay FOLDER` reads the input of a failure again."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

from tests.fuzz.run import DOORS, replay, report, run

SECONDS = "LLM2CLIP_FUZZ_SECONDS"


def main() -> int:
    """Run the command; the exit status is 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=float(os.environ.get(SECONDS, 30)), help=f"or {SECONDS}")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--doors", nargs="*", choices=[door.name for door in DOORS], help="default: all of them")
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz"), help="where failing inputs are stored")
    parser.add_argument("--replay", type=Path, help="folder of a stored failure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llm2clip-fuzz-") as work:
        os.environ["XDG_CACHE_HOME"] = work
        if options.replay is not None:
            outcome, reason = replay(options.replay, Path(work))
            print(outcome, reason, sep="\n")
            return outcome == "failed"
        found = run(options.seconds, Path(work), options.failures, options.first, options.doors or None)
    print(report(found))
    return bool(found.failures)


if __name__ == "__main__":
    sys.exit(main())
