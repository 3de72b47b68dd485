"""Work that one process does for all."""

from __future__ import annotations

from pathlib import Path

from tests.processes import run_ranks

SCRIPT = """
import sys
from pathlib import Path

import torch

from llm2clip.command_line.processes import (
    gather_results,
    leave_process_group,
    on_main_process,
    process_state,
    sum_over_processes,
)

rank = process_state().process_index
seen = [on_main_process(lambda: f"result of {rank}")]
try:
    on_main_process(lambda: open(f"nothing-{rank}"))
except FileNotFoundError as error:
    seen.append(error.filename)
seen += gather_results(lambda: f"{rank}")
try:
    gather_results(lambda: 1 // rank)
except ZeroDivisionError:
    seen.append("error")
seen.append(str(sum_over_processes(torch.tensor([10**15, rank + 1])).tolist()))
Path(sys.argv[1], f"seen-{rank}").write_text(" ".join(seen))
leave_process_group()
"""


def test_result_and_error_of_the_main_process_and_sums_reach_all(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_ranks([str(script), str(tmp_path)], 2)
    # A file per process: what two processes print into one pipe may mix within a line.
    for rank in range(2):
        assert (tmp_path / f"seen-{rank}").read_text() == "result of 0 nothing-0 0 1 error [2000000000000000, 3]"
