"""Python in processes that have imported nothing of this package, within the time of a fork.

Importing torch takes longer than most of what such a process is for. So one process imports libraries that do not read
the environment, and forks for every order; a fork has an environment and a folder of its own. Those that read it, as
huggingface_hub does, are imported by the fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = (
    *("PIL.Image", "pandas", "pyarrow", "safetensors", "scipy.stats", "sklearn.metrics", "sympy", "torch"),
    *("torch._dynamo", "torch.distributed.fsdp", "torchvision"),
)
OUTPUT, ERRORS = "stdout", "stderr"


def run_code(command: list[str], env: dict[str, str], cwd: str | Path, **_: Any) -> subprocess.CompletedProcess[str]:
    """Run `[sys.executable, ..., "-c", CODE, ARGUMENTS...]` as `subprocess.run` with its output captured as text."""
    code = command.index("-c") + 1
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        order = {"argv": ["-c", *command[code + 1 :]], "code": command[code], "env": env, "cwd": str(cwd)}
        print(json.dumps({**order, "outputs": folder}), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        output, errors = ((Path(folder) / name).read_text() for name in (OUTPUT, ERRORS))
    return subprocess.CompletedProcess(command, status, output, errors)


@cache
def _server() -> subprocess.Popen[str]:
    """The process that forks; it ends with this one, since its orders do."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-I", __file__], **pipes)


def _next_order() -> dict[str, Any]:
    """Wait for orders and fork for each; the child returns with its own, the parent ends where there are no more."""
    for line in sys.stdin:
        if os.fork() == 0:
            order: dict[str, Any] = json.loads(line)
            return order
        _, status = os.wait()
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


def _run(argv: list[str], code: str, env: dict[str, str], cwd: str, outputs: str) -> int:
    """Run code as `python -c` does; returns the exit status."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, OUTPUT), (2, ERRORS)):
        os.dup2(os.open(os.path.join(outputs, name), os.O_WRONLY | os.O_CREAT), number)
    sys.argv = argv
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    from importlib import import_module

    for library in LIBRARIES:
        import_module(library)
    status = _run(**_next_order())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
