"""Python in processes of its own, by torchrun where they are several, and what befalls one of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from llm2clip import cli
from tests.forks import ForkServer

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def start_python(
    arguments: list[str], processes: int = 1, folder: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Start python with arguments, in a folder, as the leader of a group of processes with its output in pipes."""
    command = [sys.executable, *([*LAUNCHER, str(processes)] if processes > 1 else []), *arguments]
    options = {"cwd": folder, "env": {**ENVIRONMENT, **environment}, "start_new_session": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run_python(
    arguments: list[str],
    processes: int = 1,
    check: bool = True,
    folder: Path | None = None,
    seconds: float = 500,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run python with arguments in a folder; with check, show the end of its output if it fails.

    A script that joins a process group has to leave it at its end, as the commands of llm2clip do: otherwise threads
    of torch may abort the process at exit.
    """
    process = start_python(arguments, processes, folder, **environment)
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # torchrun ends its processes, which are in sessions of their own, within 30 seconds.
        process.terminate()
        output, errors = process.communicate(timeout=60)
        raise AssertionError(f"not at its end after {seconds} seconds: {errors[-4000:]}") from None
    assert not check or process.returncode == 0, errors[-4000:]
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def run_ranks(arguments: list[str], ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run python with `-m MODULE` or a script on ranks that find the libraries imported, as torchrun would.

    For what ranks compute. What becomes of ranks that are killed, hang or fail is for `run_python`, whose torchrun
    is part of that.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = _stages().run(arguments, folder, ranks=ranks)
    assert not check or result.returncode == 0, result.stderr[-4000:]
    return result


@cache
def _stages() -> ForkServer:
    modules = [cli.COMMANDS[name].module for name in ("stage1", "stage2", "mntp", "embed", "evaluate")]
    return ForkServer(modules, {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)})
