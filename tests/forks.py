"""Python in processes that find their libraries imported, within the time of a fork.

Importing torch takes longer than most of what such a process is for. So one process imports libraries, and forks for
every order, several times where there are several ranks.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# They do not read the environment; those that do, as huggingface_hub does, are imported by the fork. The last ones are
# half of what transformers imports.
LIBRARIES = (
    *("PIL.Image", "pandas", "pyarrow", "safetensors", "scipy.stats", "sklearn.metrics", "sympy", "torch"),
    *("torch._dynamo", "torch.distributed.fsdp", "torchvision.transforms.v2", "filelock", "jinja2.sandbox", "regex"),
    *("tokenizers.trainers", "torchao.prototype.mx_formats.inference_workflow", "torchao.quantization", "trio"),
)
# After these a rank that waits for another one hangs.
SECONDS = 300


class ForkServer:
    """A process that has imported modules; it ends with this one, since its orders do.

    Args:
        modules: What it imports.
        environment: Its environment variables. Without them it has those of this process, and finds no module of the
            checkout.
    """

    def __init__(self, modules: Sequence[str], environment: dict[str, str] | None = None) -> None:
        source = ["-I", __file__] if environment is None else ["-m", "tests.forks"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, *source, *modules], cwd=ROOT, env=environment, **pipes)

    def run(
        self, arguments: list[str], folder: str | Path, environment: dict[str, str] | None = None, ranks: int = 1
    ) -> subprocess.CompletedProcess[str]:
        """Run python with `-c CODE`, `-m MODULE` or a script in a folder.

        Args:
            environment: All environment variables; by default those of the server.
            ranks: Processes at the same time, with the variables that torchrun sets, whose output is joined.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory() as place:
            outputs = [Path(place, name) for name in ("stdout", "stderr")]
            for path in outputs:
                path.touch()
            order = {"arguments": arguments, "folder": str(folder), "environment": environment}
            order |= {"outputs": list(map(str, outputs)), "ranks": _ranks(ranks)}
            print(json.dumps(order), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in outputs))


def run_code(command: list[str], env: dict[str, str], cwd: str | Path, **_: Any) -> subprocess.CompletedProcess[str]:
    """Run `[sys.executable, ..., "-c", CODE, ARGUMENTS...]` as `subprocess.run` with its output captured as text.

    The process has imported nothing of this package.
    """
    return _libraries().run(command[command.index("-c") :], cwd, env)


@cache
def _libraries() -> ForkServer:
    return ForkServer(LIBRARIES)


def _ranks(count: int) -> list[dict[str, str]]:
    """Return the environment variables that torchrun sets for each of several ranks; none for one."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _next_order() -> dict[str, Any]:
    """Wait for orders and fork for each; a child returns with its own, the parent ends where there are no more."""
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        running = set()
        for variables in order.pop("ranks"):
            process = os.fork()
            if process == 0:
                if variables:
                    os.environ.update(variables)
                    signal.alarm(SECONDS)
                return order
            running.add(process)
        print(_first_failure(running), flush=True)
    os._exit(0)


def _first_failure(running: set[int]) -> int:
    """Wait until all have ended, and let none of them wait for one that has failed; returns 0 or its exit status."""
    failure = 0
    while running:
        process, status = os.wait()
        running.remove(process)
        if status and not failure:
            failure = os.waitstatus_to_exitcode(status)
            for other in running:
                os.kill(other, signal.SIGKILL)
    return failure


def _run(arguments: list[str], folder: str, environment: dict[str, str] | None, outputs: list[str]) -> Any:
    """Run what python would; returns what it would exit with."""
    os.chdir(folder)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    for number, name in enumerate([os.devnull, *outputs]):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), number)
    kind, *rest = arguments
    sys.argv = ["-c", *rest[1:]] if kind == "-c" else rest if kind == "-m" else arguments
    try:
        if kind == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(kind).resolve().parent)
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        return end.code
    except BaseException:
        return traceback.format_exc()
    return 0


if __name__ == "__main__":
    from importlib import import_module

    for module in sys.argv[1:]:
        import_module(module)
    # No fork looks for garbage in what is imported, nor copies its memory for that.
    gc.collect()
    gc.freeze()
    status = _run(**_next_order())
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the seconds that it takes to tidy up all libraries.
    os._exit(status or 0)
