"""Python in processes of its own, by torchrun where they are several."""

import os
import subprocess
import sys

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def run_python(
    arguments: list[str], processes: int = 1, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run python with arguments; with check, show the end of its output if it fails.

    A script that joins a process group has to leave it at its end, as the commands of llm2clip do: otherwise threads
    of torch may abort the process at exit.
    """
    command = [sys.executable, *([*LAUNCHER, str(processes)] if processes > 1 else []), *arguments]
    result = subprocess.run(command, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=500)
    assert not check or result.returncode == 0, result.stderr[-4000:]
    return result
