"""A reader's shell: every command runs in a process of its own, which finds the libraries imported.

Importing them takes longer than most commands do on tiny models. So a process (`python -m tests.documents.shell`)
imports them once, and forks for every command, several times where a command has several ranks. Programs that start
processes themselves are started as they are.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.documents.reading import ROOT

# Run as modules, since an environment that borrows its packages does not have their console scripts.
MODULES = {
    "llm2clip": "llm2clip",
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.accelerate_cli",
}
OUTPUT, ERRORS = ".stdout", ".stderr"
# After these a rank that waits for another one hangs.
SECONDS = 300


@dataclass(frozen=True)
class Result:
    """What a command left behind: exit status, and what it wrote to stdout and stderr."""

    code: int
    output: str
    errors: str


class Shell:
    """Runs commands, between entering and leaving it.

    Args:
        environment: Environment variables of the commands.
        commands: The subcommands of `llm2clip` whose libraries are imported; by default all.
    """

    def __init__(self, environment: dict[str, str], commands: Sequence[str] = ()) -> None:
        self.environment, self.commands = environment, commands

    def __enter__(self) -> Shell:
        command = [sys.executable, "-m", "tests.documents.shell", *self.commands]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(command, cwd=ROOT, env=self.environment, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.communicate()

    def run(self, line: str, folder: Path, ranks: int = 1) -> Result:
        """Run a command of one line in a folder, with `ranks` as under torchrun; their output is in one file."""
        program, *arguments = shlex.split(line)
        if program in ("llm2clip", "python"):
            assert self.server.stdin is not None
            assert self.server.stdout is not None
            for name in (OUTPUT, ERRORS):
                (folder / name).write_bytes(b"")
            order = {"program": program, "arguments": arguments, "folder": str(folder), "ranks": _ranks(ranks)}
            print(json.dumps(order), file=self.server.stdin, flush=True)
            code = int(self.server.stdout.readline())
        else:
            with (folder / OUTPUT).open("w") as output, (folder / ERRORS).open("w") as errors:
                code = subprocess.call(
                    self.command(line), cwd=folder, env=self.environment, stdout=output, stderr=errors
                )
        return Result(code, (folder / OUTPUT).read_text(), (folder / ERRORS).read_text())

    def command(self, line: str) -> list[str]:
        """The arguments of a new process that runs a command."""
        program, *arguments = shlex.split(line)
        module = [] if program == "python" else ["-m", MODULES[program]]
        return [sys.executable, *module, *arguments]


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


def _run(program: str, arguments: list[str], folder: str) -> int | str | None:
    """Run a command; returns what it would exit with."""
    os.chdir(folder)
    for number, name in ((0, os.devnull), (1, OUTPUT), (2, ERRORS)):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), number)
    try:
        if program == "llm2clip":
            return cli.main(arguments)
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    except BaseException:
        return traceback.format_exc()
    return 0


def _end(status: int | str | None) -> None:
    """End the process as Python does, but without the seconds that it takes to tidy up all libraries."""
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    from importlib import import_module

    from llm2clip import cli

    for name in sys.argv[1:] or cli.COMMANDS:
        import_module(cli.COMMANDS[name].module)
    _end(_run(**_next_order()))
