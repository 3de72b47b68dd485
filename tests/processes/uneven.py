"""`python -m tests.processes.uneven FOLDER` runs what is listed in `FOLDER/cases.json`, one after the other.

It is for torchrun: a process group that lasts takes less than a start for each case.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from llm2clip.cli import COMMANDS
from llm2clip.command_line.processes import leave_process_group, process_state
from llm2clip.command_line.settings import build_config
from llm2clip.data import CaptionSource
from llm2clip.evaluation.evaluate import evaluate

# After these a case hangs.
SECONDS = 60


def outcome(command: str, fields: dict[str, Any]) -> Any:
    """Run a command; returns its result, or the text of its error."""
    try:
        if command == "evaluate":
            (result,) = evaluate(fields["model"], CaptionSource.from_dict(fields["data"]))
            return result.scores
        module = importlib.import_module(COMMANDS[command].module)
        return module.run(build_config(getattr(module, COMMANDS[command].config), fields))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    """Write the outcomes that this rank sees to `FOLDER/rank-N.json`."""
    folder, rank = Path(sys.argv[1]), process_state().process_index
    found = {}
    for name, (command, fields) in json.loads((folder / "cases.json").read_text()).items():
        print(f"case {name}, rank {rank}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        found[name] = outcome(command, fields)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    leave_process_group()


if __name__ == "__main__":
    main()
